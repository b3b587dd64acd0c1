"""One prompt pass and the decode steps after it, each timed apart, on a loaded model."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from bench.clock import Clock
from bench.record import Latency
from bench.scenario import Scenario
from quantize.errors import UserError

WARMUP_DECODE_STEPS = 8
"""Decode steps of a warm-up: all decode steps have the shape of one token, so a few are enough."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one prompt pass (the first new token included) and of each decode step after it."""

    prefill_s: float
    decode_s: tuple[float, ...]


def prompt_ids(scenario: Scenario, vocabulary: int, device: torch.device) -> torch.Tensor:
    """The scenario's prompt: int64 [batch, prompt_tokens], drawn evenly from the vocabulary by its seed."""
    generator = torch.Generator().manual_seed(scenario.seed)
    shape = (scenario.batch, scenario.prompt_tokens)
    return torch.randint(0, vocabulary, shape, generator=generator).to(device)


@torch.no_grad()
def greedy_pass(model: Any, prompt: torch.Tensor, decode_steps: int, clock: Clock[Any]) -> Pass:
    """Run the prompt, then `decode_steps` tokens one by one, always taking the likeliest, and time each.

    The loop does what `model.generate` does for greedy search without a stop token, and no more. Only the
    last position's logits are computed for the prompt where the model can do that.
    """
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    last_logits = {"logits_to_keep": 1} if last_only else {}
    clock.settle()
    marks = [clock.mark()]
    output = model(input_ids=prompt, use_cache=True, **last_logits)
    token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
    marks.append(clock.mark())
    for _ in range(decode_steps):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        marks.append(clock.mark())
    prefill_s, *decode_s = clock.intervals_s(marks)
    return Pass(prefill_s, tuple(decode_s))


def measure_latency(model: Any, scenario: Scenario, clock: Clock[Any], *, repetitions: int, warmups: int) -> Latency:
    """Warm up at the scenario's shape, then time it `repetitions` times; every sample is kept.

    A warm-up is the whole prompt pass and the first few decode steps. Raises UserError when the model has
    fewer positions than the scenario needs.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    needed = scenario.prompt_tokens + scenario.decode_steps
    if positions is not None and needed > positions:
        raise UserError(f"needs {needed} positions, the model has {positions}: use a smaller --prompt or --new")
    prompt = prompt_ids(scenario, config.vocab_size, model.device)
    warmup_steps = min(scenario.decode_steps, WARMUP_DECODE_STEPS)
    warm = [greedy_pass(model, prompt, warmup_steps, clock) for _ in range(warmups)]
    passes = [greedy_pass(model, prompt, scenario.decode_steps, clock) for _ in range(repetitions)]
    return Latency(
        prefill_s=tuple(one.prefill_s for one in passes),
        decode_s=tuple(one.decode_s for one in passes),
        warmup_s=tuple(one.prefill_s + sum(one.decode_s) for one in warm),
    )
