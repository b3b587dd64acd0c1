"""Codes that make up for what quantizing the layers before has changed, where that holds on other text.

Of the change (X - X^) W^T of a linear layer's output, X its inputs in the source model and X^ in the quantized one, a
share CORRECTION becomes part of what its codes are rounded towards (QEP, arXiv 2504.09629).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.int4.weight import Int4Weight, round_to_nearest
from quantize.rounding.gptq import Target, round_with_feedback, sweep
from quantize.rounding.gram import SHRINKAGE, InputStats, product_dtype
from quantize.rounding.options import AwqOptions

CORRECTION = 0.25  # all of it fits the calibration text alone: the next layers' inputs drift further, not back
TRIED_ROWS = 128  # of a layer's, rounded without the correction as well
ROW_BLOCK = 4096  # rows at a time: more, and 16 columns of them leave a core's cache; fewer, and calls cost more

Parts = tuple[Tensor, ...]  # what rows become, row by row: codes, and scales where they are chosen too
Some = slice | Tensor  # numbers of rows
Attempt = Callable[[Some, Tensor | None], Parts]  # (rows, B [n, in]) -> what they become


@dataclass(frozen=True)
class Watched:
    """What a layer sees of text not calibrated on, float32 [tokens, in]: in the source model, and in the quantized."""

    exact: Tensor
    found: Tensor

    def error(self, weight: Tensor, quantized: Tensor) -> float:
        """|X W^T - X^ Q^T|^2 of rows [n, in] of the source's weights and of what they became."""
        return float((self.exact @ weight.t()).sub_(self.found @ quantized.t()).square_().sum())


def correct_rows(
    weight: Tensor,
    stats: InputStats,
    watched: Watched | None,
    attempt: Attempt,
    values: Callable[[Parts, Some], Tensor],
) -> Parts:
    """What `attempt` makes of rows [n, in] with the correction, or without it where that is no worse on watched text.

    values: (parts of some rows, which rows) -> the weights that they stand for. TRIED_ROWS of the rows decide, which
    are rounded both ways before the others."""
    cross = None if stats.cross is None else stats.cross.to(product_dtype(weight.device, weight.shape[1]))

    def rounded(blocks: Sequence[Some], corrected: int) -> Parts:
        """Block after block of rows; the first so many of each with the correction."""
        found = []
        for own in blocks:
            rows, pull = weight[own], None
            if cross is not None and corrected > 0:
                of_weights = cross[own] if len(cross) < len(cross.t()) else rows.to(cross.dtype) @ cross
                pull = of_weights.float().mul_(CORRECTION)
                pull[corrected:] = 0
            found.append(attempt(own, pull))
            del pull
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    count = len(weight)
    size = -(-count // max(1, round(count / ROW_BLOCK)))
    every = [slice(start, start + size) for start in range(0, count, size)]
    if cross is None or watched is None:
        return rounded(every, 0)
    sample = torch.arange(0, count, max(1, count // TRIED_ROWS), device=weight.device)
    tried = rounded([torch.cat([sample, sample])], len(sample))
    ways = (
        values(tuple(part[rows] for part in tried), sample) for rows in (slice(len(sample)), slice(len(sample), None))
    )
    corrected, uncorrected = (watched.error(weight[sample], one) for one in ways)
    return rounded(every, count if corrected < uncorrected else 0)


def round_rows(
    weight: Tensor, stats: InputStats, options: AwqOptions, clip: Tensor | None = None, watched: Watched | None = None
) -> Int4Weight:
    """Quantize float32 [rows, in] weights to groupwise 4 bits as the options say; they see inputs of these statistics.

    clip: [rows, in / group_size], the largest magnitudes that the groups keep; watched: as `correct_rows` takes it.
    Raises ArithmeticError for statistics that are not finite."""
    size = options.group_size
    if options.rounding == "nearest":
        nearest = round_to_nearest(weight, size, clip)
        return sweep(nearest, weight, stats.shrunk(), codes_too=False) if options.refit else nearest
    target, gram = Target.of(stats.gram, SHRINKAGE), stats.shrunk() if options.refit else stats.gram

    def attempt(which: Some, pull: Tensor | None) -> Parts:
        own = weight[which]
        found = round_with_feedback(own, target, size, None if clip is None else clip[which], pull)
        found = sweep(found, own, gram, pull) if options.refit else found
        return found.codes, found.scales, found.zeros

    return Int4Weight(*correct_rows(weight, stats, watched, attempt, lambda parts, _: Int4Weight(*parts).dequantize()))
