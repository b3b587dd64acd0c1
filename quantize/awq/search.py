"""The activation-aware search (AWQ, arXiv 2306.00978) posed on Gram matrices: no token is touched."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.awq.gram import InputStats, output_error
from quantize.awq.int4 import rounded

SCALE_GRID = 20
CLIP_GRID = 20
CLIP_STEPS = 10
"""autoawq's grids: 20 scale exponents; clipping to 1, 0.95, ... 0.55 of a group's largest magnitude."""


@dataclass(frozen=True)
class ScaleChoice:
    """The per-input-feature scales [in] that the search chose, and its loss beside that of no scaling at all.

    exponent: the grid point in [0, 1) that gave them, None where not scaling won; losses are tr(D H D^T).
    """

    scales: Tensor
    exponent: float | None
    loss: float
    loss_unscaled: float


def candidate_scales(weights: Sequence[Tensor], stats: InputStats, group_size: int) -> list[tuple[float, Tensor]]:
    """AWQ's grid of scales, autoawq's "duo" form: mean|x|^a / mean|w|^(1 - a) for a = 0, 0.05, ... 0.95.

    |w| is taken relative to the largest of its group, averaged over the output features of all the layers that
    share the input. Each candidate is normalised so that its largest times its smallest entry is one.
    """
    relative_sum = torch.zeros_like(stats.abs_mean)
    rows = 0
    for weight in weights:
        grouped = weight.abs().view(weight.shape[0], -1, group_size)
        relative_sum += (grouped / (grouped.amax(dim=-1, keepdim=True) + 1e-6)).sum(dim=0).view(-1)
        rows += weight.shape[0]
    w_mean = relative_sum / rows
    candidates = []
    for step in range(SCALE_GRID):
        exponent = step / SCALE_GRID
        scales = (stats.abs_mean.pow(exponent) / (w_mean.pow(1 - exponent) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scales[~torch.isfinite(scales)] = 1
        candidates.append((exponent, scales))
    return candidates


def search_scale(weights: Sequence[Tensor], stats: InputStats, group_size: int) -> ScaleChoice:
    """Choose the scales s that minimise sum over layers of || X (Q(W s) / s - W)^T ||^2 (AWQ, equation 4).

    weights: float32 [out_k, in] of the layers that share one input; stats: of that input.
    No scaling is one of the candidates, so the choice is never worse than it.
    """

    def loss_of(scales: Tensor | None) -> float:
        total = stats.gram.new_zeros(())
        for weight in weights:
            scaled = weight if scales is None else weight * scales
            difference = rounded(scaled.view(weight.shape[0], -1, group_size)).view(weight.shape)
            if scales is not None:
                difference /= scales
            total += output_error(difference.sub_(weight), stats.gram)
        return float(total)

    unscaled = loss_of(None)
    best = ScaleChoice(torch.ones_like(stats.abs_mean), None, unscaled, unscaled)
    for exponent, scales in candidate_scales(weights, stats, group_size):
        loss = loss_of(scales)
        if loss < best.loss:
            best = ScaleChoice(scales, exponent, loss, unscaled)
    return best


def search_clip(weight: Tensor, stats: InputStats, group_size: int) -> Tensor:
    """Choose for each group the magnitude to clip at, minimising the error of that group's share of the output.

    weight: float32 [out, in], AWQ scales applied; stats: of the scaled input. Returns float32 [out, in / group_size].
    The loss of a group is d H_gg d^T, H_gg the diagonal block of the Gram matrix that belongs to it.
    """
    out_features, in_features = weight.shape
    groups = in_features // group_size
    blocks = _diagonal_blocks(stats.gram, group_size)
    grouped = weight.view(out_features, groups, group_size).transpose(0, 1).contiguous()  # [groups, out, size]
    largest = grouped.abs().amax(dim=-1)
    best_clip = largest.clone()
    best_error = torch.full_like(largest, torch.inf)
    for step in range(CLIP_STEPS):
        clip = largest * (1 - step / CLIP_GRID)
        clipped = torch.clamp(grouped, -clip.unsqueeze(-1), clip.unsqueeze(-1))
        difference = rounded(clipped).sub_(grouped)
        error = torch.bmm(difference, blocks).mul_(difference).sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_clip = torch.where(better, clip, best_clip)
    return best_clip.t().contiguous()


def _diagonal_blocks(gram: Tensor, group_size: int) -> Tensor:
    """[in, in] -> [groups, group_size, group_size]."""
    groups = gram.shape[0] // group_size
    view = gram.view(groups, group_size, groups, group_size)
    index = torch.arange(groups, device=gram.device)
    return view[index, :, index, :].contiguous()
