"""The activation-aware search (AWQ, arXiv 2306.00978) posed on Gram matrices: no token is touched."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.int4.weight import covering, minmax_range, rounded
from quantize.rounding.gram import InputStats, row_errors

SCALE_GRID, CLIP_GRID, CLIP_STEPS = 20, 20, 10  # autoawq's: scale exponents; clips to 1, 0.95, ... 0.55 of the most
SOME_WEIGHTS, MOST_WEIGHTS, FINALISTS = 2**21, 2**23, 5  # all scales are tried on rows with some, the best on most
MANY_GROUPS = 1500  # where no clip of so many is better, the search for clips ends
CACHED_WEIGHTS = 2**18  # are worked on at a time: what is made of them then lies in a core's cache
GPU_TIMES = 64  # as many at a time on a GPU, which few would keep waiting for Python


@dataclass(frozen=True)
class Reader:
    """Linear layers, one above the other, that read channels of what scales are searched for.

    weight:   float32 [out, in]; stats: of their input.
    channels: int64 [in], the channel that each input feature comes from, negative for none.
    share:    of the tokens that they see."""

    weight: Tensor
    stats: InputStats
    channels: Tensor
    share: float = 1.0

    def spread(self, scales: Tensor) -> Tensor:
        """Scales a channel -> a scale an input feature, 1 where it comes from none; [in]."""
        return torch.where(self.channels >= 0, scales[self.channels.clamp(min=0)], 1)

    def gather(self, values: Tensor, count: int) -> Tensor:
        """A value an input feature -> their mean a channel, 0 for a channel that none comes from; [count]."""
        known = self.channels >= 0
        channels = self.channels[known]
        total = values.new_zeros(count).index_add_(0, channels, values[known])
        return total / torch.bincount(channels, minlength=count).clamp(min=1)


@dataclass(frozen=True)
class ScaleChoice:
    """The scales [channels] that the search chose, and their loss tr(D H D^T) on the rows that decide.

    exponent: the grid point in [0, 1) that gave them, None where not scaling won."""

    scales: Tensor
    exponent: float | None
    loss: float


def some_rows(weight: Tensor, of: int | None = None, most: int = SOME_WEIGHTS) -> Tensor:
    """Rows of a weight [out, in], evenly spread, that hold about so many, or all. of: its rows and its peers'."""
    return weight[:: max(1, (of or len(weight)) * weight.shape[1] // most)]


def relative_magnitude(weight: Tensor, group_size: int) -> Tensor:
    """AWQ's mean |w| [in]: each weight relative to the largest of its group, averaged over the output features."""
    total = weight.new_zeros(weight.shape[1])
    for rows in _cached_rows(weight):
        grouped = rows.abs().view(len(rows), -1, group_size)
        total += (grouped / (grouped.amax(dim=-1, keepdim=True) + 1e-6)).sum(dim=0).view(-1)
    return total / len(weight)


def _cached_rows(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, _at_a_time(weight) // weight.shape[1]))


def _at_a_time(weight: Tensor) -> int:
    return CACHED_WEIGHTS * (1 if weight.device.type == "cpu" else GPU_TIMES)


def grid_scales(abs_mean: Tensor, magnitude: Tensor, step: int) -> Tensor:
    """Point `step` of AWQ's grid of scales, autoawq's "duo" form: mean|x|^a / mean|w|^(1 - a), a = step / 20.

    Normalised so that the largest times the smallest entry is one."""
    exponent = step / SCALE_GRID
    scales = (abs_mean.pow(exponent) / (magnitude.pow(1 - exponent) + 1e-4)).clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    scales[~torch.isfinite(scales)] = 1
    return scales


def search_scale(readers: Sequence[Reader], group_size: int, free: Tensor) -> ScaleChoice:
    """Choose the scales s that minimise || X (Q(W s) / s - W)^T ||^2 (AWQ, equation 4), summed over the readers.

    free: bool [channels], those that may be scaled. No scaling is one of the candidates, so the choice is never worse
    than it on the rows that decide."""
    count, rows = len(free), sum(len(one.weight) for one in readers)
    abs_mean = readers[0].stats.abs_mean.new_zeros(count)
    magnitude = abs_mean.clone()
    for one in readers:
        abs_mean += one.gather(one.stats.abs_mean, count) * one.share
        magnitude += one.gather(relative_magnitude(one.weight, group_size), count) * (len(one.weight) / rows)

    def scales_of(step: int | None) -> Tensor:
        scales = torch.ones_like(abs_mean)
        if step is not None:
            scales[free] = grid_scales(abs_mean[free], magnitude[free], step)
        return scales

    def loss_of(scales: Tensor, most: int) -> float:
        total = 0.0
        for one in readers:
            weight, spread = some_rows(one.weight, rows, most), one.spread(scales)
            difference = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for own, part in zip(_cached_rows(weight), _cached_rows(difference), strict=True):
                grouped = (own * spread).view(len(own), -1, group_size)
                torch.sub(rounded(grouped, *minmax_range(grouped)).view(own.shape).div_(spread), own, out=part)
            total += one.share * float(row_errors(difference, one.stats.gram_lowp).sum())
        return total if total == total else float("inf")  # what is no number is not chosen

    tried: list[int | None] = [None, *range(SCALE_GRID)]  # not scaling wins where nothing is better
    for most, kept in ((SOME_WEIGHTS, FINALISTS), (MOST_WEIGHTS, 1)):
        losses = {step: loss_of(scales_of(step), most) for step in tried}
        step, *_ = tried = sorted(tried, key=losses.__getitem__)[:kept]
        if rows * readers[0].weight.shape[1] < 2 * most:  # these were all
            break
    return ScaleChoice(scales_of(step), None if step is None else step / SCALE_GRID, losses[step])


def search_clip(weight: Tensor, stats: InputStats, group_size: int) -> Tensor:
    """Choose for each group the magnitude to clip at, minimising the error of that group's share of the output.

    weight: float32 [out, in], AWQ scales applied; stats: of the scaled input. Returns float32 [out, in / group_size].
    The loss of a group is d H_gg d^T, H_gg the diagonal block of the Gram matrix that belongs to it."""
    grouped = weight.view(weight.shape[0], -1, group_size).transpose(0, 1)  # [groups, out, size]
    blocks = stats.gram.view(len(grouped), group_size, len(grouped), group_size)
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # [groups, size, size]
    clips = torch.empty(grouped.shape[:2], device=weight.device)
    rows = max(1, _at_a_time(weight) // group_size)
    together = max(1, _at_a_time(weight) // (group_size * min(rows, len(weight))))
    for start in range(0, len(weight), rows):
        parts = (torch.split(one[:, start : start + rows], together) for one in (grouped, clips))
        for some, found, block in zip(*parts, torch.split(blocks, together), strict=True):
            found.copy_(_best_clip(some.contiguous(), block))
    return clips.t().contiguous()


def _best_clip(grouped: Tensor, blocks: Tensor) -> Tensor:
    """The magnitudes [groups, rows] to clip weights [groups, rows, size] at, by these blocks [groups, size, size]."""
    low, high = grouped.amin(dim=-1).clamp_(max=0), grouped.amax(dim=-1).clamp_(min=0)
    largest = torch.maximum(-low, high)
    best_clip, best_error = largest, torch.full_like(largest, torch.inf)
    for step in range(CLIP_STEPS):
        clip = largest * (1 - step / CLIP_GRID)
        difference = rounded(grouped, *covering(torch.maximum(low, -clip), torch.minimum(high, clip))).sub_(grouped)
        error = torch.bmm(difference, blocks).mul_(difference).sum(dim=-1)
        better = error < best_error
        if error.numel() > MANY_GROUPS and not bool(better.any()):  # nor will a smaller one be
            break
        best_error = torch.where(better, error, best_error)
        best_clip = torch.where(better, clip, best_clip)
    return best_clip
