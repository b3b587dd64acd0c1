"""autoawq's compiled GEMV kernels on CUDA (package autoawq-kernels): what the published GEMV rows ran on."""

import torch
from torch import Tensor

from quantize.int4.packing import pack_gemv
from quantize.int4.weight import Int4Weight
from quantize.kernels.autoawq_gemm import compiled_kernels
from quantize.kernels.base import Int4Linear, Kernel
from quantize.quiet import quiet_libraries

MATVEC_TOKENS = 8
"""Up to here autoawq's layer multiplies token by token, above with a second kernel for the same layout."""


class AutoawqGemvLinear(Int4Linear):
    """autoawq's own WQLinear_GEMV, filled with our tensors; it computes in float16 and adds the bias itself."""

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None)
        with quiet_libraries():
            from awq.modules.linear.gemv import WQLinear_GEMV
        inner = WQLinear_GEMV(4, weight.group_size, self.in_features, self.out_features, bias is not None, device)
        for name, tensor in pack_gemv(weight).items():
            setattr(inner, name, tensor.to(device))
        if bias is not None:
            inner.bias = bias.to(device, torch.float16)
        self.inner = inner

    def matmul(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out.to(x.dtype)


def _unsupported_reason(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA"
    return None if compiled_kernels() else "needs the package autoawq-kernels"


def _describe(tokens: int, dtype: torch.dtype) -> str:
    return f"autoawq compiled {'GEMV' if tokens <= MATVEC_TOKENS else 'GEMV layout GEMM'} (float16)"


AUTOAWQ_GEMV = Kernel(
    name="autoawq-gemv",
    unsupported_reason=_unsupported_reason,
    prepare=AutoawqGemvLinear,
    describe=_describe,
    compute_dtype=lambda tokens, dtype: torch.float16,
    style="GEMV",
)
