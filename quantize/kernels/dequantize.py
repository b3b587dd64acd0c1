"""The reference kernel: unpack the weights, then an ordinary matrix product. Every other is tested against it."""

from torch import Tensor

from quantize.kernels.base import Kernel, dtype_name
from quantize.kernels.block_packing import WordsLinear


class DequantizeLinear(WordsLinear):
    """Unpacks at every call; float32 arithmetic gives the exact stored weights."""

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.unpacked().dequantize(self.dtype).t()


DEQUANTIZE = Kernel(
    name="dequantize",
    unsupported_reason=lambda weight, device, dtype: None,
    prepare=DequantizeLinear,
    describe=lambda tokens, dtype: f"dequantize + matmul ({dtype_name(dtype)})",
)
