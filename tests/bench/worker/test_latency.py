from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.records.record import Latency
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule
from bench.worker.clock import Clock
from bench.worker.latency import (
    WARMUP_DECODE_STEPS,
    kv_cache_formula_bytes,
    measure_latency,
    prompts_of,
    timed_pass,
    tokens_sha256,
)
from quantize.decoding.eager import EagerDecoder
from quantize.errors import UserError
from tests.fake_clock import FakeClock

CPU = torch.device("cpu")
TWICE = PassRule(min_passes=2, max_time_s=100.0)
CHAT = Scenario("chat", prompt_tokens=12, new_tokens=15)


class FakeModel:
    """A model whose prompt pass takes 2 s and whose n-th decode step takes n/10 s, on a fake clock."""

    device = CPU
    dtype = torch.float32

    def __init__(self, clock: FakeClock, positions: int | None = None) -> None:
        self.clock = clock
        self.prompts: list[torch.Tensor] = []
        settings = SimpleNamespace(vocab_size=7)
        if positions is not None:
            settings.max_position_embeddings = positions
        self.config = SimpleNamespace(get_text_config=lambda: settings)

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool, past_key_values: int | None = None, logits_to_keep: int = 0
    ) -> Any:
        assert use_cache
        if past_key_values is None:
            assert logits_to_keep == 1
            self.prompts.append(input_ids)
            self.clock.advance(2.0)
        else:
            assert input_ids.shape == (self.prompts[-1].shape[0], 1)
            self.clock.advance((past_key_values + 1) / 10)
        logits = torch.zeros(input_ids.shape[0], 1, 7)
        return SimpleNamespace(logits=logits, past_key_values=0 if past_key_values is None else past_key_values + 1)

    __call__ = forward


def test_prefill_and_every_decode_step_are_timed_apart() -> None:
    clock = FakeClock()
    latency = measure_latency(FakeModel(clock), CHAT, clock, TWICE)[0]
    steps = pytest.approx([n / 10 for n in range(1, 15)])
    assert latency.prefill_s == pytest.approx((2.0, 2.0))
    assert [list(one) for one in latency.decode_s] == [steps, steps]
    warm = 2.0 + sum(n / 10 for n in range(1, WARMUP_DECODE_STEPS + 1))
    assert latency.warmup_s == pytest.approx((warm, warm))
    assert (latency.steady, latency.stopped, latency.decode_mode) == (True, "noise", "eager")
    assert latency.prefill_by_length_s == ()


def test_a_bare_prefill_has_no_decode_steps() -> None:
    clock = FakeClock()
    scenario = Scenario("published", prompt_tokens=12, new_tokens=1)
    latency = measure_latency(FakeModel(clock), scenario, clock, TWICE)[0]
    assert latency == Latency((2.0, 2.0), ((), ()), (2.0, 2.0), steady=True, stopped="noise")


def test_the_warm_up_has_the_measured_shape() -> None:
    clock = FakeClock()
    model = FakeModel(clock)
    looks: list[int] = []
    rule = PassRule(steady_passes=1, max_warmups=1, max_time_s=0.0)
    _, _, sha256 = measure_latency(
        model, Scenario("x", 12, 3, batch=4), clock, rule, between=lambda: looks.append(len(model.prompts))
    )
    warm, measured = model.prompts
    assert looks == [1]
    assert sha256 == tokens_sha256([measured])
    assert warm.shape == (4, 12)
    assert torch.equal(warm, measured)


class SlowerWithLength(FakeModel):
    """A prompt takes 2 s and a hundredth of a second more for each of its tokens."""

    def forward(
        self, input_ids: torch.Tensor, use_cache: bool, past_key_values: int | None = None, logits_to_keep: int = 0
    ) -> Any:
        if past_key_values is None:
            self.clock.advance(input_ids.shape[1] / 100)
        return super().forward(input_ids, use_cache, past_key_values, logits_to_keep)

    __call__ = forward


def test_several_lengths_take_their_turns_in_every_pass() -> None:
    clock = FakeClock()
    model = SlowerWithLength(clock)
    scenario = Scenario.over("x", (30, 50, 100), 3, batch=2)
    latency, _, _ = measure_latency(model, scenario, clock, TWICE)
    assert latency.prefill_s == pytest.approx((7.8, 7.8))
    assert [list(each) for each in latency.prefill_by_length_s] == [pytest.approx([2.3, 2.5, 3.0])] * 2
    assert [list(steps) for steps in latency.decode_s] == [pytest.approx([0.1, 0.2] * 3)] * 2
    assert [tuple(prompt.shape) for prompt in model.prompts] == [(2, 30), (2, 50), (2, 100)] * 4
    assert all(torch.equal(*pair) for pair in zip(model.prompts[:3], model.prompts[-3:], strict=True))


def test_the_hash_is_over_all_prompts() -> None:
    clock = FakeClock()
    hashes = [
        measure_latency(FakeModel(clock), scenario, clock, TWICE)[2]
        for scenario in (Scenario("x", 5, 1), Scenario.over("x", (5, 5), 1), Scenario.over("x", (5, 5, 5), 1))
    ]
    first, _ = prompts_of(Scenario.over("x", (5, 5), 1), 7, CPU)
    assert hashes[0] == tokens_sha256([first])
    assert len(set(hashes)) == 3


def test_the_longest_prompt_must_fit() -> None:
    clock = FakeClock()
    scenario = Scenario.over("x", (2, 10), 3)
    with pytest.raises(UserError, match="needs 12 positions, the model has 11"):
        measure_latency(FakeModel(clock, positions=11), scenario, clock, TWICE)
    assert measure_latency(FakeModel(clock, positions=12), scenario, clock, TWICE)[0].prefill_s


def test_the_prompt_is_the_seeds_and_covers_the_vocabulary() -> None:
    scenario = Scenario("x", prompt_tokens=500, new_tokens=1, batch=2)
    ids = prompts_of(scenario, 7, CPU)[0]
    assert ids.shape == (2, 500)
    assert ids.dtype == torch.int64
    assert set(ids.flatten().tolist()) == set(range(7))
    assert torch.equal(ids, prompts_of(scenario, 7, CPU)[0])
    assert not torch.equal(ids, prompts_of(Scenario("x", 500, 1, batch=2, seed=1), 7, CPU)[0])


def test_more_positions_than_the_model_has() -> None:
    clock = FakeClock()
    with pytest.raises(UserError, match=r"needs 26 positions, the model has 25: use a smaller --prompt or --new"):
        measure_latency(FakeModel(clock, positions=25), CHAT, clock, TWICE)
    assert measure_latency(FakeModel(clock, positions=26), CHAT, clock, TWICE)[0].prefill_s


def test_the_loop_decodes_what_generate_decodes(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompt = prompts_of(Scenario("x", 20, 9, batch=2), model.config.vocab_size, CPU)[0]
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    timed = timed_pass(lambda: EagerDecoder(model), [prompt], 8, Clock())
    hook.remove()
    with torch.no_grad():
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, min_new_tokens=9, do_sample=False
        )
    assert [ids.shape[1] for ids in seen] == [20] + [1] * 8
    assert torch.equal(torch.cat(seen, dim=1), expected[:, :-1])
    assert len(timed.decode_s) == 8
    assert timed.kv_cache_bytes == kv_cache_formula_bytes(model.config, Scenario("x", 20, 9, batch=2), torch.float32)
    assert timed.prefill_s > 0
    assert min(timed.decode_s) > 0
