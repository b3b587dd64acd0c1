"""autoawq's own layers on CUDA: its compiled kernels (package autoawq-kernels), and for GEMM else its Triton ones."""

import importlib.util
import math
from functools import partial

import torch
from torch import Tensor

from quantize.int4.packing import PACKERS
from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel, Style
from quantize.quiet import quiet_libraries

DEQUANTIZE_TOKENS = 1024  # from here on autoawq's GEMM layer dequantizes and multiplies, in either implementation
MATVEC_TOKENS = 8  # up to here its GEMV layer multiplies token by token, above with a second kernel for the layout
SPLIT_INPUTS = 256  # which it splits among eight blocks, 32 at a time, and reads beyond the end of others


class AutoawqLinear(Int4Linear):
    """WQLinear_GEMM or WQLinear_GEMV, filled with our tensors; it computes in float16 and adds the bias itself."""

    def __init__(
        self, layout: Style, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(weight, None)
        with quiet_libraries():
            from awq.modules import linear
        made = getattr(linear, f"WQLinear_{layout}")
        inner = made(4, weight.group_size, self.in_features, self.out_features, bias is not None, device)
        for name, tensor in PACKERS[layout](weight).items():
            setattr(inner, name, tensor.to(device))
        if bias is not None:
            inner.bias = bias.to(device, torch.float16)
        self.inner = inner.eval()

    def matmul(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.unsqueeze(0))
        return out.squeeze(0).to(x.dtype)


def compiled_kernels() -> bool:
    try:
        import awq_ext  # type: ignore[import-not-found] # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _unsupported_reason(layout: Style, weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA"
    if layout == "GEMM" and importlib.util.find_spec("awq") is None:
        return "needs the package autoawq"
    if not compiled_kernels():
        if layout == "GEMV":
            return "needs the package autoawq-kernels"
        return None if importlib.util.find_spec("triton") else "needs the package autoawq-kernels or triton"
    # On what does not fit, the compiled kernels raise or, on an H200, gave wrong sums.
    (out_features, in_features), group = weight.codes.shape, weight.group_size
    multiple = math.lcm(64, group) if layout == "GEMM" else 64
    if out_features % multiple:
        return f"needs output features in multiples of {multiple}, the layer has {out_features}"
    if layout == "GEMV" and group not in (64, 128):
        return f"needs groups of 64 or 128, the layer has {group}"
    if layout == "GEMV" and in_features % SPLIT_INPUTS:
        return f"needs input features in multiples of {SPLIT_INPUTS}, the layer has {in_features}"
    return None


def _way(layout: Style, tokens: int) -> str:
    if layout == "GEMV":
        return f"autoawq compiled {'GEMV' if tokens <= MATVEC_TOKENS else 'GEMV layout GEMM'}"
    way = "dequantize + matmul" if tokens >= DEQUANTIZE_TOKENS else "GEMM"
    return f"autoawq {'compiled' if compiled_kernels() else 'Triton'} {way}"


def _kernel(layout: Style) -> Kernel:
    reason, prepare, way = partial(_unsupported_reason, layout), partial(AutoawqLinear, layout), partial(_way, layout)
    return Kernel(f"autoawq-{layout.lower()}", reason, prepare, way, lambda tokens, dtype: torch.float16, layout)


AUTOAWQ_GEMM, AUTOAWQ_GEMV = _kernel("GEMM"), _kernel("GEMV")
