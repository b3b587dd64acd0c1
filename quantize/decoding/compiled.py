"""Decoding with one step compiled on a CPU: what a step takes is then the weights' cost, not Python's."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantize.decoding.static import StaticDecoder
from quantize.errors import UserError
from quantize.quiet import quiet_libraries

COMPILED = "compiled"


class CompiledDecoder(StaticDecoder):
    """A decoder on a static cache whose steps torch.compile made one C++ function of; the prompt runs eagerly.

    compile_s: seconds that this took, the first step's run included.
    """

    @torch.no_grad()
    def __init__(self, model: Any, *, batch: int, positions: int) -> None:
        """Make the cache, and compile a step for `batch` sequences of up to `positions` tokens.

        Raises UserError as StaticDecoder does, on CUDA, without a C++ compiler, and for a model that does not compile.
        """
        check_device(next(model.parameters()).device)
        super().__init__(model, batch=batch, positions=positions)
        self.name = COMPILED
        started = time.perf_counter()
        step: Callable[[], Tensor] = torch.compile(self._pass, fullgraph=True, dynamic=False)
        try:
            with quiet_libraries():
                step()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of dynamo, of inductor, of the compiler: each has types of its own
            why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"a decode step cannot be compiled ({why}): use --mode eager") from None
        self._compiled = step
        self.compile_s = time.perf_counter() - started

    def _run(self) -> Tensor:
        # Whether another step of this process is meant is all that is asked: no shape changes, and to look at every
        # module of the model takes a tenth of the step.
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return self._compiled()


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
