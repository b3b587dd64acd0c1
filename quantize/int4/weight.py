"""Groupwise asymmetric 4-bit weights: ranges, rounding and back. Pure functions on tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 15  # the highest 4-bit code: codes run from 0 to 15
SMALLEST_RANGE = 1e-5  # a group of equal weights still gets a scale above zero; the same floor as autoawq's


@dataclass(frozen=True)
class Int4Weight:
    """One linear layer's weight as AWQ stores it, before any packing.

    codes:  uint8 [out, in], values 0 to 15.
    scales: float16 [out, in / group_size].
    zeros:  uint8 [out, in / group_size], values 0 to 15.

    The weight it stands for is w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g] with g = i // group_size."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        if self.scales.shape != self.zeros.shape or self.scales.shape[0] != out_features:
            raise ValueError("scales and zeros are [out, groups]")
        if in_features % self.scales.shape[1]:
            raise ValueError("the groups divide the input features evenly")

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def to(self, device: torch.device) -> "Int4Weight":
        return Int4Weight(self.codes.to(device), self.scales.to(device), self.zeros.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight it stands for, [out, in] in `dtype`."""
        weight = self.codes.view(*self.scales.shape, self.group_size).to(dtype)
        weight.sub_(self.zeros.to(dtype).unsqueeze(-1)).mul_(self.scales.to(dtype).unsqueeze(-1))
        return weight.view(self.codes.shape)


def minmax_range(grouped: Tensor, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero point that cover each group's smallest and largest weight, zero included.

    grouped: [..., group_size]; clip: [...], the largest magnitudes that count, None for all. Returns scales and zeros,
    both [...] in the input's dtype; the scales are values that float16 holds exactly, because that is how they are
    stored: rounding against the stored scale loses less than rounding first and storing afterwards. A scale that
    float16 would flush to zero is kept at its smallest."""
    low, high = grouped.amin(dim=-1).clamp_(max=0), grouped.amax(dim=-1).clamp_(min=0)
    return covering(low, high) if clip is None else covering(torch.maximum(low, -clip), torch.minimum(high, clip))


def covering(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """`minmax_range` of groups whose smallest and largest weights, zero included, are these."""
    scales = ((high - low).clamp_(min=SMALLEST_RANGE) / LEVELS).half().to(low.dtype)
    zeros = (-low / scales).round_().clamp_(0, LEVELS)
    return scales, zeros


def rounded(grouped: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The groups as rounding to nearest in these ranges gives them back: quantized and dequantized, same shape."""
    steps = (grouped / scales.unsqueeze(-1)).round_()
    return steps.clamp_(-zeros.unsqueeze(-1), LEVELS - zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))


def round_to_nearest(weight: Tensor, group_size: int, clip: Tensor | None = None) -> Int4Weight:
    """Quantize [out, in] weights by rounding each to its group's nearest code, clamp(round(w / scale) + zero, 0, 15).

    clip: [out, in / group_size], the largest magnitude a group's weights may keep; None keeps all."""
    grouped = weight.float().view(weight.shape[0], -1, group_size)
    scales, zeros = minmax_range(grouped, clip)
    codes = (grouped / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, LEVELS)
    return Int4Weight(codes.to(torch.uint8).view(weight.shape), scales.half(), zeros.to(torch.uint8))
