"""Our kernels' storage of 4-bit weights: eight codes to a word, so placed that every kernel reads its inputs in order.

A row's codes are cut into blocks of 128 inputs, the last filled up with zeros; a block is 16 words. The code of the
block's input 32 p + 2 j + h lies at place p + 4 h of word j (a place is four bits). Cut out of all words of a block,
the codes at places p and p + 4 are therefore 32 neighbouring inputs, and four neighbouring words hold eight of them.
"""

import torch
from torch import Tensor
from torch.nn import functional

from quantize.int4.packing import PLAIN_ORDER, pack_words, unpack_words
from quantize.int4.weight import Int4Weight
from quantize.kernels.base import Int4Linear, Kernel

BLOCK_INPUTS, BLOCK_WORDS = 128, 16


def pack_blocks(codes: Tensor) -> Tensor:
    """uint8 [out, in], values 0 to 15 -> words int32 [out, 16 * blocks]."""
    filled = functional.pad(codes, (0, -codes.shape[1] % BLOCK_INPUTS))
    places = filled.view(codes.shape[0], -1, 4, BLOCK_WORDS, 2).permute(0, 1, 3, 4, 2)
    return pack_words(places.reshape(codes.shape[0], -1), PLAIN_ORDER)


class WordsLinear(Int4Linear):
    """words: int32 [out, 16 * blocks]; scales: float16, zeros: uint8, both [out, groups].

    It unpacks them at every call, which in float32 gives the exact stored weights; subclasses are faster."""

    words: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weight, None if bias is None else bias.to(device, dtype))
        self.dtype = dtype
        weight = weight.to(device)
        self.register_buffer("words", pack_blocks(weight.codes))
        self.register_buffer("scales", weight.scales.contiguous())
        self.register_buffer("zeros", weight.zeros.contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        places = unpack_words(self.words, PLAIN_ORDER).view(self.out_features, -1, BLOCK_WORDS, 2, 4)
        codes = places.permute(0, 1, 4, 2, 3).reshape(self.out_features, -1)[:, : self.in_features]
        return x @ Int4Weight(codes, self.scales, self.zeros).dequantize(self.dtype).t()


DEQUANTIZE = Kernel("dequantize", lambda weight, device, dtype: None, WordsLinear, lambda tokens: "dequantize + matmul")
"""The reference kernel, an ordinary matrix product: every other is tested against it."""
