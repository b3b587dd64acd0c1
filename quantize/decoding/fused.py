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

ROTARY = "apply_rotary_pos_emb"


@contextlib.contextmanager
def fused_steps(norms: Sequence[nn.Module], rotary: Sequence[ModuleType]) -> Iterator[None]:
    """Inside, a pass over one token runs in fewer kernels. norms, rotary: `plain_norms`, `llama_like`, found once."""
    own = {module: getattr(module, ROTARY) for module in rotary}
    for norm in norms:
        norm.forward = functools.partial(fused_norm, norm)
    for module, embedding in own.items():
        setattr(module, ROTARY, FusedRotary(embedding))
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
    return nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def llama_like(model: nn.Module) -> list[ModuleType]:
    """The source modules of a model whose rotary embedding is Llama's, to the instruction."""
    sources = [sys.modules[name] for name in sorted({type(module).__module__ for module in model.modules()})]
    return [source for source in sources if _rotary_code(source) == _rotary_code(modeling_llama)]


def _rotary_code(source: ModuleType) -> list[tuple[bytes, tuple[str, ...]]]:
    codes = [getattr(source, name).__code__ for name in (ROTARY, "rotate_half") if hasattr(source, name)]
    return [(code.co_code, code.co_names) for code in codes]


class FusedRotary:
    """Llama's rotary embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in four kernels, not ten.

    Queries and keys are turned together; turning by half the features and the sign of the sine stand for the negated
    half. The signed sine is made in the first layer of a step and shared by all.
    """

    def __init__(self, own: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._own = own
        self._sine: Tensor | None = None
        self._signed: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """As transformers calls it: q and k [batch, heads, tokens, head], cos and sin [batch, tokens, head]."""
        if cos.shape[-1] != q.shape[-1] or q.dtype != cos.dtype:
            return self._own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        half = q.shape[-1] // 2
        if self._sine is not sin or self._signed is None:
            self._sine, self._signed = sin, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        both = torch.cat((q, k), dim=unsqueeze_dim)
        cosine, signed = cos.unsqueeze(unsqueeze_dim), self._signed.unsqueeze(unsqueeze_dim)
        turned = torch.addcmul(both * cosine, both.roll(half, dims=-1), signed)
        queries, keys = torch.split(turned, [q.shape[unsqueeze_dim], k.shape[unsqueeze_dim]], dim=unsqueeze_dim)
        return queries, keys
