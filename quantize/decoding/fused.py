"""A decode step of one token in fewer kernels, for the mode that records it: the same mathematics, rounded less often.

The replacements know the plain forms that Llama's family shares and leave everything else alone; what they compute is
compared with eager decoding before anything is timed (quantize.decoding.static).
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from quantize.kernels.triton import launch

ROTARY = "apply_rotary_pos_emb"


@contextlib.contextmanager
def fused_steps(norms: Sequence[nn.Module], rotary: Sequence[ModuleType]) -> Iterator[None]:
    """Inside, a pass over one token runs in fewer kernels. norms, rotary: `plain_norms`, `llama_like`, found once."""
    own = {module: getattr(module, ROTARY) for module in rotary}
    for norm in norms:
        norm.forward = functools.partial(fused_norm, norm)
    for module, embedding in own.items():
        setattr(module, ROTARY, functools.partial(fused_rotary, embedding))
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for module, embedding in own.items():
            setattr(module, ROTARY, embedding)


def plain_norms(model: nn.Module) -> list[nn.Module]:
    """A model's RMS norms of the plain kind, weight * x / rms(x), as written in eight operations."""
    named = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    return [norm for norm in named if hasattr(norm, "variance_epsilon") and "forward" not in vars(norm)]


def fused_norm(norm: Any, hidden: Tensor) -> Tensor:
    """weight * x / rms(x) in one kernel, which multiplies with the weight before it rounds."""
    from quantize.decoding.step_programs import norm_program

    hidden, width = hidden.contiguous(), norm.weight.shape[0]
    out, warps = torch.empty_like(hidden), min(8, max(1, width // 256))
    sizes = width, norm.variance_epsilon, _power(width)
    launch(norm_program, (hidden.numel() // width, 1, 1), (hidden, norm.weight, out), sizes, num_warps=warps)
    return out


def llama_like(model: nn.Module) -> list[ModuleType]:
    """The source modules of a model whose rotary embedding is Llama's, to the instruction."""
    sources = [sys.modules[name] for name in sorted({type(module).__module__ for module in model.modules()})]
    return [source for source in sources if _rotary_code(source) == _rotary_code(modeling_llama)]


def _rotary_code(source: ModuleType) -> list[tuple[bytes, tuple[str, ...]]]:
    codes = [getattr(source, name).__code__ for name in (ROTARY, "rotate_half") if hasattr(source, name)]
    return [(code.co_code, code.co_names) for code in codes]


def fused_rotary(
    own: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Llama's rotary embedding (Su et al. 2021, arXiv:2104.09864) of one token's queries and keys in one kernel.

    As transformers calls it: q and k [batch, heads, 1, head], cos and sin [batch or 1, 1, head]."""
    from quantize.decoding.step_programs import rotary_program

    batch, heads, tokens, width = q.shape
    if (unsqueeze_dim, tokens) != (1, 1) or cos.shape[-1] != width:
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    q, k, cos, sin = _by_head(q), _by_head(k), cos.contiguous(), sin.contiguous()
    out, half = q.new_empty((batch, heads + k.shape[1], 1, width)), width // 2
    angles = width if len(cos) > 1 else 0
    numbers = heads, q.stride(0), k.stride(0), angles, half, _power(half)
    launch(rotary_program, (out.shape[1], batch, 1), (q, k, cos, sin, out), numbers, num_warps=1)
    queries, keys = torch.split(out, [heads, k.shape[1]], dim=1)
    return queries, keys


def fused_write(keys: Tensor, values: Tensor, position: Tensor, kept_keys: Tensor, kept_values: Tensor) -> None:
    """One token's keys and values [batch, heads, 1, width] into caches [batch, heads, slots, width], in one kernel."""
    from quantize.decoding.step_programs import slot_program

    keys, values = _by_head(keys), _by_head(values)
    widths = keys.shape[-1], values.shape[-1]
    numbers = keys.stride(0), values.stride(0), kept_keys.shape[2], *widths, *map(_power, widths)
    operands = keys, values, position, kept_keys, kept_values
    launch(slot_program, (keys.shape[1], keys.shape[0], 1), operands, numbers, num_warps=1)


def _by_head(one: Tensor) -> Tensor:
    """One token's features [batch, heads, 1, width], heads one after another in memory."""
    return one if one.stride(1) == one.shape[-1] and one.stride(3) == 1 else one.contiguous()


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()
