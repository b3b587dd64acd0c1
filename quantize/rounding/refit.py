"""After the codes are chosen: the scales that fit them best."""

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight

LARGEST_STEP = 0.3
"""A scale moves by less than this share of itself: further out the codes would no longer be the nearest."""


def refit_scales(quantized: Int4Weight, weight: Tensor, gram: Tensor) -> Int4Weight:
    """The same codes with each group's scale fitted to them by least squares on the layer's output.

    weight: float32 [out, in]; gram: float32 [in, in] of its inputs. Group after group, with D the change of the weights
    so far and c the group's codes less their zero point, s minimises tr(D H D^T): s += -(D H c) / (c H c). The scales
    stay float16 numbers, and one that would move too far stays where it is.
    """
    size = quantized.group_size
    codes = quantized.codes.view(*quantized.scales.shape, size).float() - quantized.zeros.float().unsqueeze(-1)
    scales = quantized.scales.float()
    difference = quantized.dequantize().sub_(weight)
    for group in range(scales.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        own, before = codes[:, group], scales[:, group]
        slope = (difference @ gram[:, columns]).mul_(own).sum(dim=1)
        curvature = (own @ gram[columns, columns]).mul_(own).sum(dim=1)
        step = -slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        fitted = (before + torch.where(step.abs() < LARGEST_STEP * before, step, 0)).half().float()
        difference[:, columns] += own * (fitted - before).unsqueeze(1)
        scales[:, group] = fitted
    return Int4Weight(quantized.codes, scales.half(), quantized.zeros)
