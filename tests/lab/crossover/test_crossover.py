"""Where ways to run a layer cross over: the arithmetic on known series, the measurement on a tiny layer."""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.records.environment import Environment
from bench.records.store import line_of, write
from quantize.errors import UserError
from quantize.int4.weight import Int4Weight
from quantize.kernels import KERNELS
from quantize.kernels.base import Int4Linear
from quantize.progress import Progress
from quantize.schema import to_data
from tests.fake_clock import FakeClock
from tests.lab.crossover import measure as measure_module
from tests.lab.crossover.__main__ import main
from tests.lab.crossover.contenders import Built, CannotRun, Contender, Setting, bnb, contenders, dense, int4
from tests.lab.crossover.crossings import CROSSOVER_NAME, MIN_TURNS, SAME_WITHIN, crossings
from tests.lab.crossover.measure import (
    MAX_COPIES,
    TURNS,
    Layer,
    Workload,
    build_layer,
    copies_wanted,
    layer_shapes,
    measure_crossover,
    runnable,
    time_layers,
)
from tests.lab.pages import lab_page
from tests.lab.records import CrossoverEntry, read_lab, record_from

CPU = torch.device("cpu")
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BLANK = CrossoverEntry(
    shape="tiny",
    linears=(("q_proj", 128, 128),),
    group_size=128,
    device="cpu",
    compute_dtype="float32",
    contender="",
    style="GEMM",
    tokens=None,
    measured_at="2026-01-01T00:00:00Z",
    environment=Environment(cpu="Model 1"),
    reason="not measured",
)
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
LINEARS = (
    ("self_attn.q_proj", 128, 128),
    ("self_attn.k_proj", 64, 128),
    ("self_attn.v_proj", 64, 128),
    ("self_attn.o_proj", 128, 128),
    ("mlp.gate_proj", 256, 128),
    ("mlp.up_proj", 256, 128),
    ("mlp.down_proj", 128, 256),
)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A config.json of two tiny decoder layers with grouped queries."""
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIG))
    return str(path)


def timed(contender: str, tokens: int, *seconds: float) -> CrossoverEntry:
    return replace(BLANK, contender=contender, tokens=tokens, seconds=seconds, reason=None)


def series(contender: str, seconds_of: Callable[[int], float], counts: Sequence[int] = COUNTS) -> list[CrossoverEntry]:
    return [timed(contender, tokens, *[seconds_of(tokens)] * 5) for tokens in counts]


def against_flat(*ratios: float) -> list[CrossoverEntry]:
    """One contender with these ratios to another at 1, 2, 4, ... tokens."""
    pairs = list(zip(COUNTS, ratios, strict=False))
    return [
        *(timed("flat", tokens, *[1.0] * 5) for tokens, _ in pairs),
        *(timed("other", tokens, *[ratio] * 5) for tokens, ratio in pairs),
    ]


@pytest.mark.parametrize("at", [1.5, 3, 100, 1500])
def test_two_power_laws_cross_where_they_do(at: float) -> None:
    entries = series("flat", lambda tokens: 1e-3) + series("steep", lambda tokens: 1e-3 * (tokens / at) ** 0.7)
    [crossing] = crossings(entries)
    assert crossing.pair == ("flat", "steep")
    assert crossing.tokens == pytest.approx(at, rel=1e-12)
    assert (crossing.faster_below, crossing.faster_above) == ("steep", "flat")


def test_a_bend_is_interpolated_between_its_neighbours_alone() -> None:
    """Between 4 and 8 the ratio goes from 1 / 2 to 4: a third of the way in the logarithm."""
    [crossing] = crossings(against_flat(0.9, 0.8, 0.5, 4.0, 100.0))
    assert crossing.tokens == pytest.approx(4 * 2 ** (1 / 3))


@pytest.mark.parametrize(
    ("ratios", "always"),
    [
        ((2.0, 3.0, 1.5), "flat"),
        ((0.5, 0.9, 0.2), "other"),
        ((1.02, 0.98, 1.01), None),
        ((1.5, 0.98, 1.5), "flat"),  # a tie is no change of places
        ((1.5, 0.98, 0.99), "flat"),
    ],
)
def test_without_a_change_of_places_there_is_none(ratios: tuple[float, ...], always: str | None) -> None:
    [crossing] = crossings(against_flat(*ratios))
    assert (crossing.tokens, crossing.faster_below, crossing.faster_above) == (None, always, always)


@pytest.mark.parametrize("ratios", [(0.8, 0.99, 1.02, 1.25), (0.8, 0.98, 1.02, 0.99, 1.02, 1.25)])
def test_wobbling_through_a_tie_is_one_change_of_places(ratios: tuple[float, ...]) -> None:
    [crossing] = crossings(against_flat(*ratios))
    assert crossing.tokens is not None
    assert 2 < crossing.tokens < 16
    assert (crossing.faster_below, crossing.faster_above) == ("other", "flat")


def test_places_can_be_changed_twice() -> None:
    found = crossings(against_flat(2.0, 0.5, 0.5, 2.0))
    assert [crossing.tokens for crossing in found] == [pytest.approx(math.sqrt(2)), pytest.approx(math.sqrt(32))]
    assert [crossing.faster_above for crossing in found] == ["other", "flat"]


def test_turns_that_disagree_decide_nothing() -> None:
    """The medians differ by a fifth, but in two of five turns it was the other way round."""
    quick, slow = (1.0, 1.0, 1.0, 1.3, 1.3), (1.2, 1.2, 1.2, 1.2, 1.2)
    always = [timed("a", 1, *[1.0] * 5), timed("b", 1, *[2.0] * 5)]
    assert crossings([*always, timed("a", 8, *slow), timed("b", 8, *quick)])[0].tokens is None
    agreed = crossings([*always, timed("a", 8, *slow), timed("b", 8, 1.0, 1.0, 1.0, 1.0, 1.3)])
    assert agreed[0].tokens is not None
    few = [timed("a", 8, *[1.2] * (MIN_TURNS - 1)), timed("b", 8, *[1.0] * (MIN_TURNS - 1))]
    assert crossings([*always, *few])[0].tokens is None
    within = 1 + SAME_WITHIN / 2
    assert crossings([*always, timed("a", 8, *[within] * 5), timed("b", 8, *[1.0] * 5)])[0].tokens is None


def test_every_pair_is_looked_at_where_both_were_timed() -> None:
    entries = (
        series("a", lambda tokens: 1.0) + series("b", lambda tokens: tokens / 10) + series("c", lambda t: 9.0, [1])
    )
    entries.append(replace(BLANK, contender="d", tokens=1, reason="wrong"))
    found = crossings(entries)
    assert [crossing.pair for crossing in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [crossing.tokens for crossing in found] == [pytest.approx(10), None, None]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    entries = [timed("a", 1, 0.5, 0.25), replace(BLANK, contender="b", reason="needs the package b")]
    path = tmp_path / "new" / CROSSOVER_NAME
    write(path, entries)
    assert read_lab(path, CrossoverEntry) == entries
    write(path, entries[:1])
    assert read_lab(path, CrossoverEntry) == entries[:1]
    assert [one.name for one in path.parent.iterdir()] == [CROSSOVER_NAME]


def test_what_is_no_crossover_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / CROSSOVER_NAME
    with pytest.raises(UserError, match="cannot read"):
        read_lab(path, CrossoverEntry)
    good = json.loads(line_of(timed("a", 1, 0.5)))
    for lines in ("{}", "[1]", "no json", json.dumps({**good, "schema_version": 99}), json.dumps({**good, "x": 1})):
        path.write_text(lines)
        with pytest.raises(UserError, match="line 1"):
            read_lab(path, CrossoverEntry)
    write(path, [])
    with pytest.raises(UserError, match="choose another place"):
        write(path / "below" / CROSSOVER_NAME, [])


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": (1.0,), "tokens": 1},
        {"seconds": (), "reason": None},
        {"seconds": (0.0,), "tokens": 1, "reason": None},
        {"seconds": (math.nan,), "tokens": 1, "reason": None},
        {"seconds": (1.0,), "reason": None},
    ],
)
def test_an_entry_has_seconds_or_a_reason(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        record_from({**to_data(BLANK), **fields}, "here")


class Ticking(nn.Module):
    """A linear layer on which time passes: `seconds_of(tokens)` a call."""

    def __init__(self, weight: Tensor, clock: FakeClock, seconds_of: Callable[[int], float]) -> None:
        super().__init__()
        self.weight, self.clock, self.seconds_of = weight, clock, seconds_of

    def forward(self, x: Tensor) -> Tensor:
        self.clock.advance(self.seconds_of(x.shape[1]))
        return x @ self.weight.t()


def ticking(name: str, clock: FakeClock, seconds_of: Callable[[int], float], order: list[str]) -> Contender:
    def build(weight: Tensor, setting: Setting) -> Built:
        def noted(tokens: int) -> float:
            order.append(name)
            return seconds_of(tokens)

        return Ticking(weight, clock, noted), weight

    return Contender(name, "GEMM", build, lambda tokens, setting: name, lambda tokens, setting: 1e-5)


def layer_of(contender: Contender, work: Workload) -> Layer:
    return build_layer(contender, work, replace(work.entry, contender=contender.name, style=contender.style))


def test_turns_are_reversed_and_the_seconds_are_those_that_passed() -> None:
    clock, order = FakeClock(), list[str]()
    setting, linears = Setting(CPU, torch.float32, 128), (("one", 16, 128), ("two", 16, 128))
    work, entries = Workload.of("x", linears, setting, COUNTS), list[CrossoverEntry]()
    racing = [
        ticking("flat", clock, lambda tokens: 0.02, order),
        ticking("steep", clock, lambda tokens: 0.02 * tokens / 24, order),
        ticking("third", clock, lambda tokens: 0.5, order),
    ]
    layers = [layer_of(contender, work) for contender in racing]
    for tokens in COUNTS:
        order.clear()
        entries += time_layers(layers, tokens, clock, math.inf)
        if tokens == 64:  # a pass of every contender is longer than a turn: one pass, two linears
            turns = [order[-6 * TURNS :][place : place + 6 : 2] for place in range(0, 6 * TURNS, 6)]
            assert turns[0] == ["flat", "steep", "third"]
            assert turns[1] == ["third", "steep", "flat"]
            assert turns == [turns[number % 2] for number in range(TURNS)]
    by_name = {(entry.contender, entry.tokens): entry for entry in entries}
    assert by_name["flat", 8].seconds == pytest.approx([0.04] * TURNS)
    assert by_name["steep", 8].seconds == pytest.approx([0.04 / 3] * TURNS)
    assert crossings(entries)[0].tokens == pytest.approx(24)
    assert {len(entry.seconds) for entry in time_layers(layers, 1, clock, 0.0)} == {MIN_TURNS}


def test_what_fails_after_its_check_leaves_the_others_alone() -> None:
    clock, calls = FakeClock(), list[int]()

    def failing(tokens: int) -> float:
        calls.append(tokens)
        if len(calls) > 12:
            raise MemoryError("no memory left")
        return 0.5

    setting, linears = Setting(CPU, torch.float32, 128), (("one", 16, 128), ("two", 16, 128))
    work = Workload.of("x", linears, setting, (8,))
    racing = [ticking("sound", clock, lambda tokens: 0.5, []), ticking("failing", clock, failing, [])]
    sound, failed = time_layers([layer_of(one, work) for one in racing], 8, clock, math.inf)
    assert len(sound.seconds) == TURNS
    assert failed.seconds == ()
    assert "no memory left" in (failed.reason or "")


def test_the_linear_layers_of_one_decoder_layer(config: str) -> None:
    assert layer_shapes(config) == ("tiny", LINEARS)


def test_the_shape_of_the_published_table() -> None:
    name, linears = layer_shapes("mistral-7b")
    assert name == "mistral-7b"
    assert {path.rpartition(".")[2]: (out, inner) for path, out, inner in linears} == {
        "q_proj": (4096, 4096),
        "k_proj": (1024, 4096),
        "v_proj": (1024, 4096),
        "o_proj": (4096, 4096),
        "gate_proj": (14336, 4096),
        "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    }


def test_every_way_that_runs_here_is_timed_and_the_others_say_why_not(config: str, tmp_path: Path) -> None:
    told: list[str] = []
    progress = Progress(changed=lambda progress: told.append(progress.doing))
    entries = measure_crossover(config, "cpu", None, tmp_path / "out", 1e6, progress, counts=(64, 1, 4))
    assert read_lab(tmp_path / "out" / CROSSOVER_NAME, CrossoverEntry) == entries
    ran = {name: [e for e in entries if e.contender == name] for name in dict.fromkeys(e.contender for e in entries)}
    assert set(ran) == {"FP32", "BnB.4", "BnB.8", *KERNELS}
    for name in ("FP32", "torch-cpu", "dequantize", "BnB.4", "BnB.8"):
        assert [(entry.tokens, entry.reason) for entry in ran[name]] == [(1, None), (4, None), (64, None)]
        for entry in ran[name]:
            assert len(entry.seconds) == TURNS
            assert entry.relative_error is not None
            assert entry.error_bound is not None
            assert entry.relative_error <= entry.error_bound
            assert (entry.shape, entry.linears, entry.group_size) == ("tiny", LINEARS, 128)
            assert (entry.mode, entry.copies) == ("eager", 1)
    [skipped] = ran["autoawq-gemm"]
    assert (skipped.tokens, skipped.seconds, skipped.reason) == (None, (), "runs on CUDA")
    dense_bytes, packed_bytes = (ran[name][0].weights_bytes for name in ("FP32", "BnB.8"))
    assert dense_bytes == 4 * sum(out * inner for _, out, inner in LINEARS)
    assert packed_bytes is not None
    assert 0.25 < packed_bytes / dense_bytes < 0.28
    assert ran["FP32"][0].style == "dense"
    assert ran["triton-gemv"][0].style == "GEMV"
    assert told[0] == "crossover: making FP32"
    assert [one.split(",")[0] for one in told[-3:]] == [f"crossover: {tokens} tokens" for tokens in (1, 4, 64)]
    assert len(told) == len(KERNELS) + 3 + 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_holds_its_bounds_too(config: str, tmp_path: Path, dtype: str) -> None:
    entries = measure_crossover(config, "cpu", dtype, tmp_path, 600.0, counts=(1, 64))
    assert {entry.contender for entry in entries if entry.seconds} >= {"dequantize", "BnB.4", "BnB.8"}
    assert [entry.reason for entry in entries if entry.tokens and entry.reason] == []


def swapped(weight: Int4Weight) -> Int4Weight:
    """The two codes of every byte in the wrong order."""
    pairs = weight.codes.view(weight.codes.shape[0], -1, 2).flip(-1)
    return Int4Weight(pairs.reshape(weight.codes.shape), weight.scales, weight.zeros)


def faulty(name: str, fault: Callable[[Int4Linear, Tensor], Tensor]) -> Contender:
    """The plain kernel with `fault` in place of its forward."""
    sound = KERNELS["dequantize"]

    def prepare(weight: Int4Weight, *rest: Any) -> Int4Linear:
        layer = sound.prepare(weight, *rest)
        layer.forward = lambda x: fault(layer, x)  # type: ignore[method-assign]
        return layer

    return int4(replace(sound, name=name, prepare=prepare))


def test_a_wrong_kernel_is_a_reason_not_a_number(config: str, tmp_path: Path) -> None:
    sound = KERNELS["dequantize"]
    swap = replace(sound, name="swapped", prepare=lambda weight, *rest: sound.prepare(swapped(weight), *rest))

    def last_token_wrong(layer: Int4Linear, x: Tensor) -> Tensor:
        out = Int4Linear.forward(layer, x)
        out[:, -1] *= 1.1
        return out

    def fails_with_many(layer: Int4Linear, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            raise RuntimeError("too many tokens\nfor this kernel")
        return Int4Linear.forward(layer, x)

    racing = [
        dense(torch.float32),
        int4(swap),
        faulty("last token", last_token_wrong),
        faulty("not a number", lambda layer, x: Int4Linear.forward(layer, x) * torch.nan),
        faulty("one token", fails_with_many),
    ]
    entries = measure_crossover(config, "cpu", None, tmp_path, 10.0, counts=(1, 32), racing=racing)
    assert read_lab(tmp_path / CROSSOVER_NAME, CrossoverEntry) == entries
    reasons = {name: [e.reason for e in entries if e.contender == name] for name in (one.name for one in racing)}
    assert reasons["FP32"] == [None, None]
    for name in ("swapped", "last token", "not a number"):
        assert all(str(reason).startswith("wrong: off by ") for reason in reasons[name])
        assert len(reasons[name]) == 2
    assert reasons["one token"] == [None, "RuntimeError: too many tokens"]


def test_a_contender_that_cannot_be_built_is_one_entry(config: str, tmp_path: Path) -> None:
    def cannot(weight: Tensor, setting: Setting) -> Built:
        raise CannotRun("needs the package x")

    def breaks(weight: Tensor, setting: Setting) -> Built:
        raise ZeroDivisionError

    base = dense(torch.float32)
    racing = [base, replace(base, name="cannot", build=cannot), replace(base, name="breaks", build=breaks)]
    entries = measure_crossover(config, "cpu", None, tmp_path, 5.0, counts=(1,), racing=racing)
    told = {entry.contender: (entry.tokens, entry.reason) for entry in entries}
    assert told == {"FP32": (1, None), "cannot": (None, "needs the package x"), "breaks": (None, "ZeroDivisionError: ")}


def test_what_the_budget_does_not_reach_says_so(config: str, tmp_path: Path) -> None:
    racing = [dense(torch.float32), int4(KERNELS["dequantize"])]
    entries = measure_crossover(config, "cpu", None, tmp_path, 0.0, counts=(1, 2, 4), racing=racing)
    assert [len(entry.seconds) for entry in entries] == [MIN_TURNS, MIN_TURNS, 0, 0, 0, 0]
    assert {entry.reason for entry in entries[2:]} == {"not reached within the time budget of 0 s"}
    assert [(entry.contender, entry.tokens) for entry in entries[2:4]] == [("FP32", 2), ("dequantize", 2)]


def test_int8_rounds_its_inputs_and_is_allowed_that_much() -> None:
    """On CUDA LLM.int8 rounds the inputs to 127 steps of their row: the bound is twice what that costs."""
    setting = Setting(CPU, torch.float32, 128)
    for width in (4096, 14336):
        x = torch.randn((8, width), generator=torch.Generator().manual_seed(width))
        step = x.abs().amax(dim=-1, keepdim=True) / 127
        error = float(((x / step).round() * step - x).norm() / x.norm())
        assert 0.4 < error / bnb("bnb-8bit").bound(1, setting) < 0.65


def test_enough_copies_to_leave_a_gpus_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    assert copies_wanted(436 * 10**6, cuda) == 1
    assert copies_wanted(30 * 2**20, cuda) == 4
    assert copies_wanted(1000, cuda) == MAX_COPIES
    assert copies_wanted(1000, CPU) == 1


def test_what_cannot_be_captured_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, linears, cuda = Setting(CPU, torch.float32, 128), (("one", 16, 128),), torch.device("cuda")
    clock, order = FakeClock(), list[str]()
    work = Workload.of("x", linears, setting, (4,))
    ticks = ticking("ticks", clock, lambda tokens: 1.0, order)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(contender: Contender, captured: Callable[..., Callable[[], None]]) -> tuple[str, float]:
        monkeypatch.setattr(measure_module, "captured", captured)
        layer = layer_of(contender, work)
        done, mode = runnable(replace(layer, work=replace(work, setting=replace(setting, device=cuda))), 4)
        before = clock.now_s
        done()
        return mode, clock.now_s - before

    def refused(work: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    replay: Callable[[], None] = lambda: clock.advance(0.25)  # noqa: E731
    assert run(ticks, lambda work, inputs: replay) == ("CUDA graph", 0.25)
    assert run(ticks, refused) == ("eager", 1.0)
    assert run(replace(ticks, replayable=False), lambda work, inputs: replay) == ("eager", 1.0)


def test_the_dense_product_comes_first_and_is_named_after_its_dtype() -> None:
    assert [contenders(dtype)[0].name for dtype in (torch.float16, torch.bfloat16, torch.float32)] == [
        "FP16", "BF16", "FP32",
    ]  # fmt: skip
    assert [one.style for one in contenders(torch.float16)].count("dense") == 1


def test_the_command(config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", config, "--device", "cpu", "--out", str(tmp_path), "--budget", "3"]) == 0
    out, err = capfd.readouterr()
    written = ["crossover.jsonl", "crossover.md", "crossover.png", "crossover.svg"]
    if importlib.util.find_spec("matplotlib") is None:
        written = written[:2]
    assert out.splitlines()[-len(written) :] == [f"wrote {tmp_path / name}" for name in written]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(written)
    assert (tmp_path / "crossover.md").read_text() == lab_page(tmp_path / CROSSOVER_NAME)
    assert all(line.startswith("after ") for line in err.splitlines())
    entries = read_lab(tmp_path / CROSSOVER_NAME, CrossoverEntry)
    assert {entry.tokens for entry in entries if entry.contender == "FP32"} == set(COUNTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "no-such-model", "--device", "cpu"], "is no config.json"),
        (["--shape", "mistral-7b", "--device", "cpu", "--budget", "nan"], "--budget must be at least 0"),
    ],
)
def test_a_bad_command_line_is_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use --device cpu"):
        measure_crossover("mistral-7b", "cuda", out=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_graphs_are_replayed_over_copies_that_leave_its_cache(config: str, tmp_path: Path) -> None:
    entries = measure_crossover(config, "cuda", None, tmp_path, 60.0, counts=(1, 16, 256))
    fp16 = [entry for entry in entries if entry.contender == "FP16"]
    assert [(entry.mode, entry.copies, entry.reason) for entry in fp16] == [("CUDA graph", MAX_COPIES, None)] * 3
    wrong = [(e.contender, e.tokens, e.reason) for e in entries if e.reason and e.reason.startswith("wrong")]
    assert wrong == []
    ours = {
        e.contender: e.mode for e in entries if e.seconds and e.contender in ("triton", "triton-gemv", "dequantize")
    }
    assert ours["dequantize"] == "CUDA graph"
    assert set(ours.values()) == {"CUDA graph"}
