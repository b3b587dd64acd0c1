"""`quantable choose`: the measured peaks, the order, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import quantize
from bench.records.record import Memory, Record
from bench.records.scenario import Scenario
from quantize.errors import UserError
from reports.api import Reading
from reports.choose import choose, main, need_at

if TYPE_CHECKING:
    from tests.builder import Builder
    from tests.reports.conftest import Write

GALLERY = Path(__file__).parents[2] / "reports" / "gallery" / "cpu-smollm2-135m"
GB = 10**9


def test_at_a_measured_context_the_need_is_the_measured_peak_of_the_embedded_model() -> None:
    (measurement,) = Reading(GALLERY).measurements
    assert len(measurement.results) == 5
    for result in measurement.results:
        for scenario, timing in result.timings.items():
            choice = choose(GALLERY, 6 * GB, scenario.positions)
            need = next(one.need_bytes for one in choice.fit if one.name == result.subject.name)
            print(f"{result.subject.name} at {scenario.positions}: {need}, measured {timing.run_peak_bytes}")
            assert need == pytest.approx(timing.run_peak_bytes, rel=0.05)
        fewer, more = sorted(result.timings.values(), key=lambda one: one.scenario.positions)
        left = replace(result, timings={fewer.scenario: fewer})
        guess, how = need_at(left, more.scenario.positions)
        print(f"{result.subject.name}: {guess} from {fewer.scenario.positions} alone, measured {more.run_peak_bytes}")
        assert how == f"extrapolated from {fewer.scenario.positions} tokens"


def test_the_order_is_the_rule() -> None:
    def names(**given: Any) -> list[str]:
        return [one.name.removeprefix("SmolLM2-135M-Instruct-") for one in choose(GALLERY, 6 * GB, 1024, **given).fit]

    assert names()[:3] == ["FP16", "BnB.8", "BnB.4"]
    assert names(max_loss=0.1)[0].startswith("AWQ")
    assert names(max_loss=0.065)[:2] == ["BnB.4", "FP16"]
    assert names(max_loss=0.02) == ["FP16", "BnB.8"]


def test_what_does_not_fit_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GALLERY), "--memory", "750MB", "--context", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("take SmolLM2-135M-Instruct-AWQ-QGS64-W4-GEM")
    assert "not SmolLM2-135M-Instruct-FP16: needs 0.833 GB, 0.083 too much (measured)" in lines
    assert main([str(GALLERY), "--memory", "500MB", "--context", "1024"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("nothing to take: the least is needed by SmolLM2-135M-Instruct-AWQ-QGS64-W4-GEMV, 0.710")


def test_a_broken_checkpoint_is_never_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GALLERY / "broken-by-autoawq"), "--memory", "6GB", "--context", "1024", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["fit"]] == ["SmolLM2-135M-Instruct-FP16"]
    assert [one["problem"][:8] for one in found["others"]] == ["broken: "]


def measured(builder: "Builder", tokens: int, peak_bytes: int) -> Record:
    memory = Memory(500, "RSS", 600, 900, peak_bytes, kv_cache_bytes=tokens, kv_cache_formula_bytes=tokens)
    return builder.latency("fp16", Scenario(f"{tokens}", tokens, 1), memory=memory)


@pytest.mark.parametrize(
    ("peaks", "context", "need", "how"),
    [
        ({100: 1000, 300: 1500}, 200, 1250, "between 100 and 300 tokens, measured"),
        ({100: 1000, 300: 1500}, 500, 2000, "extrapolated from 300 tokens"),
        ({100: 1000, 300: 1000}, 500, 1200, "extrapolated from 300 tokens"),  # the cache alone, a byte a token
        ({100: 1000}, 300, 1000 + 200 * (1 + 3), "extrapolated from 100 tokens"),  # 300 bytes of activations
        ({100: 1000, 300: 1500}, 10, 1000, "measured at 100 tokens"),
        ({100: 1000, 200: 1300, 300: 1500}, 250, 1400, "between 200 and 300 tokens, measured"),
    ],
)
def test_between_and_beyond_what_was_measured(
    builder: "Builder", write: "Write", peaks: dict[int, int], context: int, need: float, how: str
) -> None:
    folder = write([measured(builder, *one) for one in peaks.items()])
    (one,) = choose(folder, GB, context).fit
    assert one.need_bytes == pytest.approx(need)
    assert one.how == how


def test_the_gpu_is_chosen_where_both_were_measured(new_builder: "type[Builder]", write: "Write") -> None:
    folder = write([new_builder(device=device).latency("fp16") for device in ("cpu", "cuda")])
    assert choose(folder, 2 * GB, 1024).rule.endswith("measured on cuda, float32")
    assert choose(folder, 2 * GB, 1024, device="cpu").rule.endswith("measured on cpu, float32")


def test_one_of_several_models_is_named(new_builder: "type[Builder]", write: "Write") -> None:
    folder = write([new_builder(name).latency("fp16") for name in ("Tiny-1M", "Tiny-2M")])
    with pytest.raises(UserError, match="has variants of Tiny-1M, Tiny-2M: choose one of these with --model"):
        choose(folder, GB, 1024)
    with pytest.raises(UserError, match="--model"):
        choose(folder, GB, 1024, model="Tiny-3M")
    assert [one.name for one in choose(folder, 2 * GB, 1024, model="Tiny-2M").fit] == ["Tiny-2M-FP16"]


@pytest.mark.parametrize("arguments", [("6", "0"), ("6XB", "9"), ("6GB", "9", "--max-loss", "5")])
def test_bad_input_is_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    memory, context, *others = arguments
    assert main([str(GALLERY), "--memory", memory, "--context", context, *others]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_records_it_is_an_estimate_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTABLE_CACHE", str(tmp_path))
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "architectures": ["LlamaForCausalLM"]}))
    source = f"dummy:{tmp_path / 'config.json'}"
    assert main([source, "--memory", "1GB", "--context", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"take dummy-{tmp_path.name}-FP16: needs ")
    assert lines[0].endswith("perplexity unknown (estimated)")
    assert "nothing was measured" in lines[-1]
    found = {one.w_bit: one.need_bytes for one in choose(source, GB, 1000).fit}
    weights = 2 * (2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) + 2 * 1000 * 256 + 5 * 256)
    assert found[16] == weights + 2 * 2 * 2 * 64 * 1000 * 2 + 2 * 1000 * (6 * 256 + 3 * 512) + 4 * 1000
    assert found[4] is not None
    assert found[4] < (found[8] or 0) < (found[16] or 0)
    quantize.quantize(source, ["fp16"], tmp_path / "runs")
    assert [one.need_bytes for one in choose(tmp_path / "runs", GB, 1000).fit] == [found[16]]
    with pytest.raises(UserError, match="4,096 positions"):
        choose(source, GB, 5000)
    with pytest.raises(UserError, match="--max-loss and --device need a measurement"):
        choose(source, GB, 1000, max_loss=0.05)
