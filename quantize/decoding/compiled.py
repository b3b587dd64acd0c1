"""Decoding with one step compiled on a CPU: what a step takes is then the weights' cost, not Python's."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantize.decoding.static import StaticDecoder
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

COMPILED, SDPA = "compiled", "sdpa"


class CompiledDecoder(StaticDecoder):
    """A decoder on a static cache whose steps torch.compile made one program of; the prompt runs eagerly.

    compile_s: seconds that this took, the first step's run included."""

    @torch.no_grad()
    def __init__(self, model: Any, *, batch: int, positions: int) -> None:
        """Make the cache, and compile a step for `batch` sequences of up to `positions` tokens.

        Raises UserError as StaticDecoder does, on CUDA, without a C++ compiler, and for a model that does not compile.
        """
        check_device(next(model.parameters()).device)
        super().__init__(model, batch=batch, positions=positions)
        self.name = COMPILED
        started = time.perf_counter()
        # torch keeps what it compiled with the code object. With one of its own a decoder's step is never mistaken for
        # another's, and torch need not look, at every step, whether a module of the model has changed.
        code = StaticDecoder._pass.__code__.replace(co_name=f"step_{id(self)}")
        own = MethodType(FunctionType(code, StaticDecoder._pass.__globals__), self)
        how: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        self._compiled: Callable[[], Tensor] = torch.compile(own, fullgraph=True, dynamic=False, options=how)
        try:
            with quiet_libraries(), one_query_attention():
                self._compiled()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of dynamo, of inductor, of the compiler: each has types of its own
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"a decode step cannot be compiled ({why}): use --mode eager") from None
        self.compile_s = time.perf_counter() - started

    def _run(self) -> Tensor:
        return self._compiled()


@contextlib.contextmanager
def one_query_attention() -> Iterator[None]:
    """Inside, what transformers calls sdpa is `attend`: torch's kernel is made for prompts, and has the keys copied."""
    own = ALL_ATTENTION_FUNCTIONS[SDPA]
    ALL_ATTENTION_FUNCTIONS[SDPA] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[SDPA] = own


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **others: Any
) -> tuple[Tensor, None]:
    """One query's attention by float32 products, query [batch, heads, 1, head], key, value [batch, fewer, slots, head].

    mask: [batch, 1, 1, slots], added to the scores. Returns [batch, 1, heads, head], as transformers takes it."""
    grouped = query.reshape(*key.shape[:2], -1, query.shape[-1]).float()  # several heads share a key
    scores = grouped @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    out = torch.softmax(scores + mask, dim=-1) @ value.float()
    return out.to(query.dtype).reshape(len(query), 1, -1, query.shape[-1]), None


def check_device(device: torch.device) -> None:
    """Raises UserError where a step cannot be compiled: on a GPU, and without a C++ compiler."""
    if device.type != "cpu":
        raise UserError("mode compiled is for a CPU: on a GPU use --mode graph")
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("mode compiled needs a C++ compiler: install g++, or use --mode eager") from None
