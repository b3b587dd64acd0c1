"""autoawq's GEMM kernels on CUDA: compiled (package autoawq-kernels) where they import, else its Triton ones."""

import importlib.util

import torch
from torch import Tensor

from quantize.int4.packing import pack_gemm
from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel
from quantize.quiet import quiet_libraries

DEQUANTIZE_TOKENS = 1024
"""From this many tokens on autoawq's layer dequantizes and multiplies, in either implementation."""


class AutoawqGemmLinear(Int4Linear):
    """autoawq's own WQLinear_GEMM, filled with our tensors; it computes in float16 and adds the bias itself."""

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None)
        with quiet_libraries():
            from awq.modules.linear import WQLinear_GEMM
        inner = WQLinear_GEMM(4, weight.group_size, self.in_features, self.out_features, bias is not None, device)
        for name, tensor in pack_gemm(weight).items():
            setattr(inner, name, tensor.to(device))
        if bias is not None:
            inner.bias = bias.to(device, torch.float16)
        inner.training = False
        self.inner = inner

    def matmul(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.unsqueeze(0))
        return out.squeeze(0).to(x.dtype)


def compiled_kernels() -> bool:
    """Whether autoawq's compiled extension imports here."""
    try:
        import awq_ext  # type: ignore[import-not-found] # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _unsupported_reason(weight: Int4Weight, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "runs on CUDA"
    if importlib.util.find_spec("awq") is None:
        return "needs the package autoawq"
    if not compiled_kernels() and importlib.util.find_spec("triton") is None:
        return "needs the package autoawq-kernels or triton"
    return None


def _describe(tokens: int, dtype: torch.dtype) -> str:
    implementation = "compiled" if compiled_kernels() else "Triton"
    if tokens >= DEQUANTIZE_TOKENS:
        return f"autoawq {implementation} dequantize + matmul (float16)"
    return f"autoawq {implementation} GEMM (float16)"


AUTOAWQ_GEMM = Kernel(
    name="autoawq-gemm",
    unsupported_reason=_unsupported_reason,
    prepare=AutoawqGemmLinear,
    describe=_describe,
    compute_dtype=lambda tokens, dtype: torch.float16,
)
