"""One prompt pass and the decode steps after it, each timed apart, on a loaded model."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.clock import Clock
from bench.record import Latency
from bench.scenario import Scenario
from bench.steady import Rule, repeat, warm_up
from quantize.errors import UserError

WARMUP_DECODE_STEPS = 8
"""Decode steps of a warm-up: all decode steps have the shape of one token, so a few are enough."""


@dataclass(frozen=True)
class Pass:
    """Seconds of one prompt pass (the first new token included) and of each decode step after it.

    kv_cache_bytes: what the cache held at its end, None where that cannot be told.
    """

    prefill_s: float
    decode_s: tuple[float, ...]
    kv_cache_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Of the whole pass."""
        return self.prefill_s + sum(self.decode_s)


@dataclass(frozen=True)
class Measured:
    """What timing one scenario gives: the samples, the cache's bytes (held, and by the formula), the prompt's hash."""

    latency: Latency
    kv_cache_bytes: int | None
    kv_cache_formula_bytes: int | None
    prompt_sha256: str


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
    return Pass(prefill_s, tuple(decode_s), kv_cache_bytes(output.past_key_values))


def measure_latency(
    model: Any,
    scenario: Scenario,
    clock: Clock[Any],
    rule: Rule,
    *,
    compute_dtype: torch.dtype | None = None,
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Warm up at the scenario's shape until steady, then time it until the rule has enough; every sample is kept.

    A warm-up is the whole prompt pass and the first few decode steps. compute_dtype: of keys and values, None for the
    model's own. between: called before each timed pass, outside
    of what is timed. Raises UserError when the model has fewer positions than the scenario needs.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    needed = scenario.prompt_tokens + scenario.decode_steps
    if positions is not None and needed > positions:
        raise UserError(f"needs {needed} positions, the model has {positions}: use a smaller --prompt or --new")
    prompt = prompt_ids(scenario, config.vocab_size, model.device)
    warmup_steps = min(scenario.decode_steps, WARMUP_DECODE_STEPS)
    cache_bytes: int | None = None

    def timed() -> Pass:
        nonlocal cache_bytes
        between()
        one = greedy_pass(model, prompt, scenario.decode_steps, clock)
        cache_bytes = one.kv_cache_bytes
        return one

    warmup_s, steady = warm_up(lambda: greedy_pass(model, prompt, warmup_steps, clock).seconds, rule)
    passes, stopped = repeat(timed, lambda one: one.seconds, rule)
    latency = Latency(
        prefill_s=tuple(one.prefill_s for one in passes),
        decode_s=tuple(one.decode_s for one in passes),
        warmup_s=warmup_s,
        steady=steady,
        stopped=stopped,
    )
    formula_bytes = kv_cache_formula_bytes(config, scenario, compute_dtype or model.dtype)
    return Measured(latency, cache_bytes, formula_bytes, token_sha256(prompt))


def token_sha256(tokens: torch.Tensor) -> str:
    """Hex SHA-256 of token ids."""
    return hashlib.sha256(str(tokens.tolist()).encode()).hexdigest()


def kv_cache_bytes(cache: Any) -> int | None:
    """Bytes of the keys and values that a transformers cache holds; None for a cache of another make."""
    tensors = [
        tensor
        for layer in getattr(cache, "layers", [])
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) if tensors else None


def kv_cache_formula_bytes(config: Any, scenario: Scenario, dtype: torch.dtype) -> int | None:
    """2 (keys and values) * layers * key-value heads * head size * tokens * batch * bytes of a value.

    The last new token is never fed back, so it has no entry. None where config.json does not name the parts.
    """
    heads = getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not heads or not layers or not hidden:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    tokens = scenario.prompt_tokens + scenario.decode_steps
    return int(2 * layers * kv_heads * head_size * tokens * scenario.batch * dtype.itemsize)
