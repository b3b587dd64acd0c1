"""The file layouts that are written: eight 4-bit codes in each int32, AWQ's two bit for bit as autoawq packs them.

GEMM packs along the output features in the order 0 2 4 6 1 3 5 7 (what its CUDA kernel's half2 conversion wants);
GEMV packs along the input features in plain order and pads scales and zeros to whole words.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from quantize.int4.weight import Int4Weight

CODES_PER_WORD = 8
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN_ORDER = tuple(range(CODES_PER_WORD))
Q4_1_PART, BLOCK = "q4_1", 32  # what a layer's blocks are called until they are in a GGUF file, and their inputs


def pack_words(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Pack the last dimension: uint8 [..., 8 n] with values 0 to 15 -> int32 [..., n], code order[i] at bit 4 i."""
    words = codes.view(*codes.shape[:-1], -1, CODES_PER_WORD)
    packed = torch.zeros(words.shape[:-1], dtype=torch.int32, device=codes.device)
    for position, index in enumerate(order):
        packed |= words[..., index].to(torch.int32) << (4 * position)
    return packed


def unpack_words(packed: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo pack_words: int32 [..., n] -> uint8 [..., 8 n]."""
    codes = torch.empty((*packed.shape, CODES_PER_WORD), dtype=torch.uint8, device=packed.device)
    for position, index in enumerate(order):
        codes[..., index] = ((packed >> (4 * position)) & 0xF).to(torch.uint8)
    return codes.view(*packed.shape[:-1], -1)


def pack_gemm(weight: Int4Weight) -> dict[str, Tensor]:
    """The GEMM layout: qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales float16 [groups, out]."""
    codes, zeros = (pack_words(rows.t().contiguous(), GEMM_ORDER) for rows in (weight.codes, weight.zeros))
    return {"qweight": codes, "qzeros": zeros, "scales": weight.scales.t().contiguous()}


def gemv_zeros_width(in_features: int, group_size: int) -> int:
    """Words of zero points a row in the GEMV layout: whole words, and padded as its CUDA kernel reads them.

    Group sizes below 128 are read two (64) or four (32) words at a time."""
    words = -(-(in_features // group_size) // CODES_PER_WORD)
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    return -(-words // multiple) * multiple


def pack_gemv(weight: Int4Weight) -> dict[str, Tensor]:
    """The GEMV layout: qweight int32 [out, in / 8], qzeros int32 [out, z], scales float16 [out, 8 z].

    z is gemv_zeros_width; the padding holds zeros."""
    width = gemv_zeros_width(weight.codes.shape[1], weight.group_size) * CODES_PER_WORD
    padding = (0, width - weight.scales.shape[1])
    zeros = pack_words(functional.pad(weight.zeros, padding), PLAIN_ORDER)
    codes, scales = pack_words(weight.codes, PLAIN_ORDER), functional.pad(weight.scales, padding)
    return {"qweight": codes, "qzeros": zeros, "scales": scales}


def pack_ct(weight: Int4Weight) -> dict[str, Tensor]:
    """compressed-tensors' pack-quantized: weight_packed int32 [out, in / 8] in plain order, weight_scale [out, groups].

    weight_zero_point int32 [out / 8, groups] is packed along the output features, weight_shape int64 [2]."""
    rows = weight.codes.shape[0]
    zeros = functional.pad(weight.zeros.t(), (0, -rows % CODES_PER_WORD))
    return {
        "weight_packed": pack_words(weight.codes, PLAIN_ORDER),
        "weight_scale": weight.scales.contiguous(),
        "weight_zero_point": pack_words(zeros.contiguous(), PLAIN_ORDER).t().contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }


def pack_gguf(weight: Int4Weight) -> dict[str, Tensor]:
    """GGUF's Q4_1: blocks of 32 inputs, uint8 [out, in / 32 * 20]: scale d and offset m in float16, then the codes.

    w = d q + m, m = -scale * zero rounded to float16; a byte has code i of its block low and code i + 16 high."""
    halves = weight.codes.view(len(weight.codes), -1, 2, BLOCK // 2)
    facts = torch.stack((weight.scales, (-weight.scales.float() * weight.zeros).half()), -1)
    facts = facts.repeat_interleave(weight.group_size // BLOCK, 1).view(torch.uint8)
    return {Q4_1_PART: torch.cat((facts, halves[:, :, 0] | halves[:, :, 1] << 4), -1).flatten(1)}


PACKERS: dict[str, Callable[[Int4Weight], dict[str, Tensor]]] = {
    **{"GEMM": pack_gemm, "GEMV": pack_gemv, "CT": pack_ct, "GGUF": pack_gguf}
}
"""Layout name -> how to pack one layer's weight into the tensors its state dict holds; quantize.int4.layouts reads."""
