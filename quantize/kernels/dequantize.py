"""The reference kernel: unpack the weights, then an ordinary matrix product. Every other is tested against it."""

import torch
from torch import Tensor

from quantize.awq.int4 import Int4Weight
from quantize.awq.packing import PLAIN_ORDER, pack_words, unpack_words
from quantize.kernels.base import Int4Linear, Kernel, dtype_name


class DequantizeLinear(Int4Linear):
    """Codes packed eight to a word, unpacked at every call; float32 arithmetic gives the exact stored weights."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(device, dtype))
        self.dtype = dtype
        self.register_buffer("packed", pack_words(weight.codes, PLAIN_ORDER).to(device))
        self.register_buffer("scales", weight.scales.to(device))
        self.register_buffer("zeros", weight.zeros.to(device))

    def matmul(self, x: Tensor) -> Tensor:
        weight = Int4Weight(unpack_words(self.packed, PLAIN_ORDER), self.scales, self.zeros)
        return x @ weight.dequantize(self.dtype).t()


DEQUANTIZE = Kernel(
    name="dequantize",
    why_not=lambda weight, device, dtype: None,
    prepare=DequantizeLinear,
    describe=lambda tokens, dtype: f"dequantize + matmul ({dtype_name(dtype)})",
)
