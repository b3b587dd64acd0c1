"""The plainest storage of 4-bit weights: eight codes of a row to a word, in order, as the GEMV layout has them."""

import torch
from torch import Tensor

from quantize.awq.int4 import Int4Weight
from quantize.awq.packing import PLAIN_ORDER, pack_words, unpack_words
from quantize.kernels.base import Int4Linear


class WordsLinear(Int4Linear):
    """words: int32 [out, in / 8]; scales: float16 [out, groups]; zeros: uint8 [out, groups]; subclasses multiply."""

    words: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(device, dtype))
        self.dtype = dtype
        self.register_buffer("words", pack_words(weight.codes.to(device), PLAIN_ORDER))
        self.register_buffer("scales", weight.scales.to(device).contiguous())
        self.register_buffer("zeros", weight.zeros.to(device).contiguous())

    def unpacked(self) -> Int4Weight:
        """The weight as it was before packing."""
        return Int4Weight(unpack_words(self.words, PLAIN_ORDER), self.scales, self.zeros)
