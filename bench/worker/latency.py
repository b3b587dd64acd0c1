"""Prompts and the decode steps after each, timed apart, on a loaded model."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.records.record import Latency
from bench.records.scenario import Scenario
from bench.records.stopping import PassRule, repeat, warm_up
from bench.worker.clock import Clock, seconds_of_each
from quantize.decoding.eager import EagerDecoder
from quantize.errors import UserError

WARMUP_DECODE_STEPS = 8
"""On a CPU all decode steps are alike, so that a few are enough. On CUDA the warm-up takes all: cuDNN's attention, that
torch takes there, plans every number of keys on its own when it first sees it, for longer than the step takes."""


@dataclass(frozen=True)
class Pass:
    """Seconds of each prompt (the first new token included), and of each decode step after each of them.

    kv_cache_bytes: what the cache held at its end, the most of several prompts, None where that cannot be told."""

    prefill_by_length_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    kv_cache_bytes: int | None

    @property
    def prefill_s(self) -> float:
        return math.fsum(self.prefill_by_length_s)

    @property
    def seconds(self) -> float:
        return self.prefill_s + sum(self.decode_s)


def prompts_of(scenario: Scenario, vocabulary: int, device: torch.device) -> tuple[Tensor, ...]:
    """Every prompt of the scenario, drawn evenly from the vocabulary by its seed: int64 [batch, tokens] each."""
    generator = torch.Generator().manual_seed(scenario.seed)
    shapes = [(scenario.batch, length) for length in scenario.prompt_lengths]
    return tuple(torch.randint(0, vocabulary, shape, generator=generator).to(device) for shape in shapes)


@torch.no_grad()
def timed_pass(new_decoder: Callable[[], EagerDecoder], prompts: Sequence[Tensor], steps: int, clock: Clock) -> Pass:
    """Run each prompt, then `steps` tokens one by one, and time each: all decode steps in one series.

    With an EagerDecoder it does what `model.generate` does for greedy search without a stop token, and no more."""
    prefills_s, steps_s, held = list[float](), list[float](), list[int]()
    for prompt in prompts:
        decoder = new_decoder()
        works: list[Callable[[], object]] = [partial(decoder.prefill, prompt), *[decoder.step] * steps]
        prefill_s, *decode_s = seconds_of_each(works, clock)
        prefills_s.append(prefill_s)
        steps_s += decode_s
        held += filter(None, [decoder.cache_bytes()])
    return Pass(tuple(prefills_s), tuple(steps_s), max(held, default=None))


def check_positions(model: Any, scenario: Scenario) -> None:
    """Raises UserError when the model has fewer positions than the scenario needs."""
    there = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if there is not None and scenario.positions > there:
        raise UserError(f"needs {scenario.positions} positions, the model has {there}: use a smaller --prompt or --new")


def measure_latency(
    model: Any,
    scenario: Scenario,
    clock: Clock,
    rule: PassRule,
    *,
    compute_dtype: torch.dtype | None = None,
    between: Callable[[], None] = lambda: None,
) -> tuple[Latency, dict[str, int | None], str]:
    """Warm up at the scenario's shape until steady, then time it until the rule has enough; every sample is kept.

    Returns the samples, the cache's bytes as Memory names them (held, and by the formula), and the prompts' hash.

    A warm-up is a whole pass, on a CPU but for all decode steps after the first few. compute_dtype: of keys and values,
    None for the model's own. between: called before each timed pass, outside of what is timed.

    Raises UserError as `check_positions` and, in modes but "eager", their decoders do, RuntimeError as the check."""
    check_positions(model, scenario)
    config, dtype = model.config.get_text_config(), compute_dtype or model.dtype
    prompts = prompts_of(scenario, config.vocab_size, model.device)
    new_decoder = decoders_for(model, scenario, prompts[0], dtype)
    few = WARMUP_DECODE_STEPS if model.device.type == "cpu" else scenario.decode_steps
    warmup_steps = min(scenario.decode_steps, few)

    def one_pass() -> Pass:
        between()
        return timed_pass(new_decoder, prompts, scenario.decode_steps, clock)

    warmup_s, steady = warm_up(lambda: timed_pass(new_decoder, prompts, warmup_steps, clock).seconds, rule)
    passes, stopped = repeat(one_pass, lambda one: one.seconds, rule)
    prefill_s, decode_s = tuple(one.prefill_s for one in passes), tuple(one.decode_s for one in passes)
    by_length_s = tuple(one.prefill_by_length_s for one in passes) if scenario.lengths else ()
    decoder = new_decoder()
    decode_mode = decoder.name if scenario.decode_steps else None
    latency = Latency(prefill_s, decode_s, warmup_s, steady, stopped, by_length_s, decode_mode, decoder.compile_s)
    by_formula = kv_cache_formula_bytes(config, scenario, dtype)
    cache = {"kv_cache_bytes": passes[-1].kv_cache_bytes, "kv_cache_formula_bytes": by_formula}
    return latency, cache, tokens_sha256(prompts)


def decoders_for(model: Any, scenario: Scenario, prompt: Tensor, dtype: torch.dtype) -> Callable[[], EagerDecoder]:
    """What gives a decoder of the scenario's mode: but for "eager" one for all passes, compared with eager."""
    if scenario.mode == "eager":
        return partial(EagerDecoder, model)
    from quantize.decoding.compiled import CompiledDecoder
    from quantize.decoding.static import StaticDecoder, check_against_eager

    kind = CompiledDecoder if scenario.mode == "compiled" else StaticDecoder
    decoder = kind(model, batch=scenario.batch, positions=scenario.positions)
    check_against_eager(decoder, model, prompt, scenario.decode_steps, dtype)
    return lambda: decoder


def tokens_sha256(prompts: Sequence[Tensor]) -> str:
    """Hex SHA-256 of the token ids of one prompt or several."""
    ids = [prompt.tolist() for prompt in prompts]
    return hashlib.sha256(str(ids if len(ids) > 1 else ids[0]).encode()).hexdigest()


def kv_cache_formula_bytes(config: Any, scenario: Scenario, dtype: torch.dtype) -> int | None:
    """2 (keys and values) * layers * key-value heads * head size * tokens * batch * bytes of a value.

    Tokens are the longest prompt's and those fed back, which the last is not. None where config.json lacks the parts.
    """
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not heads or not layers or not hidden:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    return int(2 * layers * kv_heads * head_size * scenario.positions * scenario.batch * dtype.itemsize)
