"""Runtime kernels for 4-bit weights, a file for each maker, and the choice between them."""

from quantize.kernels.autoawq import AUTOAWQ_GEMM, AUTOAWQ_GEMV
from quantize.kernels.base import Int4Linear, Kernel
from quantize.kernels.block_packing import DEQUANTIZE
from quantize.kernels.torch_int4 import TORCH_CPU
from quantize.kernels.triton import TRITON, TRITON_GEMV

_ROWS = (TORCH_CPU, TRITON, AUTOAWQ_GEMM, AUTOAWQ_GEMV, TRITON_GEMV, DEQUANTIZE)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ROWS}
NATIVE: dict[str, tuple[str, ...]] = {"GEMM": ("autoawq-gemm",), "GEMV": ("autoawq-gemv", "triton-gemv")}
"""Layout -> the kernels that its name stood for, the first that can run is meant."""

__all__ = ["KERNELS", "NATIVE", "Int4Linear", "Kernel"]
