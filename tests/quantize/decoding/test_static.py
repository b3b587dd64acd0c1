"""Decoding on a static cache: the same tokens as eagerly, whatever was in the cache before."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.records.scenario import Scenario
from bench.records.stopping import PassRule
from bench.worker.clock import Clock
from bench.worker.latency import kv_cache_formula_bytes, measure_latency, prompts_of, timed_pass
from quantize.decoding.eager import EagerDecoder
from quantize.decoding.static import (
    CUDA_GRAPH,
    SLOTS_STEP,
    STATIC_CACHE,
    StaticDecoder,
    check_against_eager,
    check_model,
)
from quantize.errors import UserError
from tests.fake_clock import FakeClock

CPU = torch.device("cpu")
ONCE = PassRule(max_time_s=0.0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def loaded(folder: Path, **arguments: Any) -> Any:
    """The tiny model, its queries and keys made loud, so that a wrong position or mask moves its logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **arguments}).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(8)
    return model


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return loaded(tiny_llama)


def prompt_of(model: Any, tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return prompts_of(Scenario("x", tokens, 1, batch=batch, seed=seed), model.config.vocab_size, model.device)[0]


@torch.no_grad()
def decoded(decoder: Any, prompt: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens [batch, 1 + steps], and the logits behind the last."""
    decoder.prefill(prompt)
    tokens = [decoder.token.clone()]
    for _ in range(steps):
        decoder.step()
        tokens.append(decoder.token.clone())
    return torch.cat(tokens, dim=1), decoder.logits.clone()


def check_same(decoder: StaticDecoder, model: Any, prompt: torch.Tensor, steps: int) -> None:
    tokens, logits = decoded(decoder, prompt, steps)
    expected_tokens, expected = decoded(EagerDecoder(model), prompt, steps)
    assert torch.equal(tokens, expected_tokens)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_it_decodes_what_eager_decoding_does(model: Any) -> None:
    decoder = StaticDecoder(model, batch=2, positions=20 + 15)
    assert decoder.name == STATIC_CACHE
    check_same(decoder, model, prompt_of(model, 20, batch=2), 15)


def test_nothing_of_a_longer_prompt_before_is_left(model: Any) -> None:
    decoder = StaticDecoder(model, batch=1, positions=100 + 8)
    for tokens in (100, 3, 60):
        check_same(decoder, model, prompt_of(model, tokens, seed=tokens), 8)


def test_every_slot_may_be_used(model: Any) -> None:
    decoder = StaticDecoder(model, batch=1, positions=SLOTS_STEP)
    check_same(decoder, model, prompt_of(model, SLOTS_STEP - 5), 5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_attention_sees_the_same_slots(tiny_llama: Path, attention: str) -> None:
    model = loaded(tiny_llama, attn_implementation=attention)
    check_same(StaticDecoder(model, batch=2, positions=40), model, prompt_of(model, 30, batch=2), 10)


def other_model(kind: str) -> Any:
    """A small random model of another architecture; attention to a window in all layers, or in every second one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 50,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_within_their_window_models_that_slide_one_decode_the_same(kind: str) -> None:
    model = other_model(kind)
    check_same(StaticDecoder(model, batch=1, positions=50), model, prompt_of(model, 42), 8)
    with pytest.raises(UserError, match="cannot slide a window: 51 positions, the model attends to 50"):
        StaticDecoder(model, batch=1, positions=51)


def test_the_cache_holds_its_slots(model: Any) -> None:
    decoder = StaticDecoder(model, batch=2, positions=65)
    slots = Scenario("x", 2 * SLOTS_STEP, 1, batch=2)
    assert decoder.cache_bytes() == kv_cache_formula_bytes(model.config, slots, torch.float32)


def test_it_is_timed_as_eager_decoding_is(model: Any) -> None:
    prompt = prompt_of(model, 5)
    timed = timed_pass(lambda: StaticDecoder(model, batch=1, positions=9), [prompt], 4, Clock())
    assert len(timed.decode_s) == 4
    assert min(timed.prefill_s, *timed.decode_s) > 0


def test_a_scenario_says_how_its_tokens_were_decoded(model: Any) -> None:
    scenario = Scenario.over("chat-graph", (6, 70), 4, mode="graph")
    latency, cache, _ = measure_latency(model, scenario, Clock(), ONCE)
    assert latency.decode_mode == STATIC_CACHE
    assert [len(steps) for steps in latency.decode_s] == [2 * 3]
    assert [len(each) for each in latency.prefill_by_length_s] == [2]
    assert cache["kv_cache_formula_bytes"] == kv_cache_formula_bytes(model.config, Scenario("x", 70, 4), torch.float32)
    slots = Scenario("x", 2 * SLOTS_STEP, 1)
    assert cache["kv_cache_bytes"] == kv_cache_formula_bytes(model.config, slots, torch.float32)


class OffByOne(StaticDecoder):
    """Takes the first new token for the second."""

    def prefill(self, prompt: torch.Tensor) -> None:
        super().prefill(prompt)
        self._position.add_(1)


class SeesAll(StaticDecoder):
    """Attends to slots that nothing was written to."""

    def prefill(self, prompt: torch.Tensor) -> None:
        super().prefill(prompt)
        self._slots.zero_()


class NotANumber(StaticDecoder):
    def prefill(self, prompt: torch.Tensor) -> None:
        super().prefill(prompt)
        self._cache.layers[0].values.fill_(torch.nan)


@pytest.mark.parametrize("broken", [OffByOne, SeesAll, NotANumber])
def test_the_check_lets_through_what_agrees_and_nothing_else(model: Any, broken: type[StaticDecoder]) -> None:
    prompt = prompt_of(model, 20)
    check_against_eager(StaticDecoder(model, batch=1, positions=30), model, prompt, 9, torch.float32)
    with pytest.raises(RuntimeError, match="decoding on a static cache differs from eager decoding by"):
        check_against_eager(broken(model, batch=1, positions=30), model, prompt, 9, torch.float32)


def test_a_scenario_whose_check_fails_gives_no_figures(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.decoding.static.StaticDecoder", OffByOne)
    with pytest.raises(RuntimeError, match="differs from eager decoding"):
        measure_latency(model, Scenario("x", 20, 9, mode="graph"), FakeClock(), ONCE)


def test_attention_that_takes_no_mask_is_refused(model: Any) -> None:
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="needs one of the attentions sdpa, eager, not flash_attention_2"):
        check_model(model, 10)


def test_a_model_on_several_devices_is_refused(model: Any) -> None:
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match="on one device, this one is spread over 2"):
        check_model(model, 10)


class FakeGraph:
    """Stands for a recorded step on a CPU: a replay runs the step again and leaves its logits where the first were."""

    decoder: StaticDecoder

    def replay(self) -> None:
        self.decoder._recorded_logits.copy_(self.decoder._run())


@pytest.fixture
def recording(recording: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    recording.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return recording


def test_recording_leaves_nothing_behind_and_replays_decode_the_same(model: Any, recording: pytest.MonkeyPatch) -> None:
    decoder = StaticDecoder(model, batch=2, positions=40)
    with torch.no_grad():
        graph: Any = decoder._record()
    decoder._graph = graph
    assert isinstance(graph, FakeGraph)
    graph.decoder = decoder
    assert not any("forward" in vars(module) for module in model.modules())
    for tokens in (30, 4):
        check_same(decoder, model, prompt_of(model, tokens, batch=2), 10)


@pytest.mark.parametrize(
    ("first", "told", "words"),
    [
        (RuntimeError("not permitted\nmore"), UserError, "cannot be recorded as a CUDA graph: not permitted$"),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "^no room$"),
    ],
)
def test_what_failed_first_is_told_and_not_that_recording_could_not_end(
    model: Any, recording: pytest.MonkeyPatch, first: Exception, told: type[Exception], words: str
) -> None:
    @contextlib.contextmanager
    def graph(recorded: FakeGraph) -> Iterator[None]:
        try:
            yield
            raise first
        finally:
            raise RuntimeError("the recording cannot end")

    recording.setattr(torch.cuda, "graph", graph)
    decoder = StaticDecoder(model, batch=1, positions=40)
    with torch.no_grad(), pytest.raises(told, match=words):
        decoder._record()
    assert not any("forward" in vars(module) for module in model.modules())
    check_same(decoder, model, prompt_of(model, 30), 5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cuda_graph_decodes_what_eager_decoding_does(tiny_llama: Path, dtype: torch.dtype) -> None:
    model = loaded(tiny_llama, dtype=dtype).to("cuda")
    decoder = StaticDecoder(model, batch=2, positions=60)
    assert decoder.name == CUDA_GRAPH
    for tokens in (40, 7, 40):
        check_against_eager(decoder, model, prompt_of(model, tokens, batch=2), 4, dtype)
    if dtype == torch.float32:
        check_same(decoder, model, prompt_of(model, 40, batch=2), 15)


@pytest.mark.gpu
@needs_gpu
def test_a_layer_that_waits_for_the_host_is_told_and_leaves_the_device_usable(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, dtype=torch.float16).to("cuda")
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * float(output.sum()) ** 0)
    with pytest.raises(UserError, match="cannot be recorded as a CUDA graph"):
        StaticDecoder(model, batch=1, positions=30)
    hook.remove()
    tokens, _ = decoded(EagerDecoder(model), prompt_of(model, 5), 3)
    assert tokens.shape == (1, 4)
