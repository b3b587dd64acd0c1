"""gptqmodel's CUDA kernels for AWQ weights (Marlin and Machete), where that package is installed."""

import importlib
import importlib.util
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from quantize.int4.packing import pack_gemm
from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel
from quantize.quiet import quiet_libraries

CLASSES = {  # kernel name -> module under gptqmodel.nn_modules.qlinear, class, and what tables call it
    "gptqmodel-marlin": ("marlin_awq", "AwqMarlinLinear", "Marlin"),
    "gptqmodel-machete": ("machete_awq", "AwqMacheteLinear", "Machete"),
}


class GptqmodelLinear(Int4Linear):
    """One of gptqmodel's own layers, filled with our tensors in the GEMM layout, which it repacks for itself."""

    def __init__(
        self, name: str, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(weight, None if bias is None else bias.to(device, dtype))
        self.dtype = half_of(dtype)
        with _kept_to_itself():
            inner = _class_of(name)(**_arguments(weight), bias=False, dtype=self.dtype, register_buffers=True)
            for part, tensor in pack_gemm(weight).items():
                kept = getattr(inner, part)
                kept.data = tensor.to(kept.dtype)
            inner = inner.to(device)
            inner.post_init()
        self.inner = inner.eval()

    def matmul(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.to(self.dtype))
        return out.to(x.dtype)


def half_of(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float16


@contextmanager
def _kept_to_itself() -> Iterator[None]:
    """Importing gptqmodel prints a banner and sets environment variables (the order of devices, the allocator's
    settings), which would change what is measured beside it: neither leaves this block."""
    nowhere = io.StringIO()
    with patch.dict(os.environ), redirect_stdout(nowhere), redirect_stderr(nowhere), quiet_libraries():
        yield


def _class_of(name: str) -> Any:
    module, class_name, _ = CLASSES[name]
    return getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), class_name)


def _arguments(weight: Int4Weight) -> dict[str, Any]:
    sizes = dict(zip(("out_features", "in_features"), weight.codes.shape, strict=True))
    return {"bits": 4, "group_size": weight.group_size, **sizes, "desc_act": False, "sym": False}


def _unsupported_reason(name: str, weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("gptqmodel") is None:
        return "needs the package gptqmodel"
    if device.type != "cuda":
        return "needs a CUDA GPU"
    try:
        with _kept_to_itself():
            chosen = _class_of(name)
            chosen.validate_device(device)
            fits, problem = chosen.validate(**_arguments(weight), pack_dtype=torch.int32)
    except Exception as error:  # whatever another package's import or compiler raises, this kernel cannot run
        fits, problem = False, error
    words = str(problem).strip().splitlines() or ["no reason given"]
    return None if fits else f"gptqmodel says: {words[0][:120]}"


def _kernel(name: str) -> Kernel:
    reason, prepare = partial(_unsupported_reason, name), partial(GptqmodelLinear, name)
    way = f"gptqmodel {CLASSES[name][2]}"
    return Kernel(name, reason, prepare, lambda tokens: way, lambda tokens, dtype: half_of(dtype))


GPTQMODEL = tuple(map(_kernel, CLASSES))
