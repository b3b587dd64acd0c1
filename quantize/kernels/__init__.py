"""Runtime kernels for 4-bit weights, one file each, and the choice between them."""

from quantize.kernels.autoawq_gemm import AUTOAWQ_GEMM
from quantize.kernels.base import Int4Linear, Kernel
from quantize.kernels.dequantize import DEQUANTIZE
from quantize.kernels.torch_cpu import TORCH_CPU
from quantize.kernels.torch_cuda import TORCH_CUDA

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (TORCH_CPU, AUTOAWQ_GEMM, TORCH_CUDA, DEQUANTIZE)}
"""Every kernel by name, in the order in which they are tried."""

__all__ = ["KERNELS", "Int4Linear", "Kernel"]
