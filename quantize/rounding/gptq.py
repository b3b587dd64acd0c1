"""Rounding that compensates: GPTQ's error feedback (arXiv 2210.17323) inside fixed ranges, then scales refitted."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantize.int4.weight import LEVELS, Int4Weight, minmax_range

DAMPING = 0.05  # share of the mean diagonal added to the Gram matrix; the paper adds 0.01
MOST_DAMPING = 1e9  # with so much the matrix is its diagonal: what cannot be factorised then is not finite
COLUMN_BLOCK = 128
SMALLEST_BLOCK = 16  # blocks of columns are halved down to it: small products between halves in place of outer ones
LARGEST_STEP = 0.3  # a refitted scale moves by less than this share of itself: beyond, other codes would be nearer

Nearest = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with a column's number, its values [out], and where to write the nearest codes [out], whole numbers, and the
errors [out], which are the values before less after."""


def inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor U of (H + damping * mean(diag H) I)^-1, so that the inverse is U^T U; [in, in].

    With H = V V^T for an upper V, which is the lower factor of H read backwards, U is the inverse of V.
    Input features that never fire get a diagonal of one. Where float32 cannot factorise the matrix, float64 tries,
    then ten times the damping: the Gram matrix of few tokens is close to singular. Raises ArithmeticError for NaN, Inf.
    """
    damping = DAMPING
    while damping < MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            damped = gram.to(dtype, copy=True)
            diagonal = damped.diagonal()
            dead = diagonal <= 0
            diagonal.add_(damping * float(diagonal.mean()))
            diagonal[dead] = 1
            backwards, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not bool(failed):
                factor = inverse_triangle(backwards.flip(0, 1))
                if bool(torch.isfinite(factor).all()):
                    return factor.float()
        damping *= 10
    raise ArithmeticError("the Gram matrix is not finite, so that it has no inverse")


def inverse_triangle(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix [n, n], itself upper triangular.

    By halves, in matrix products: the inverse of [[A, B], [0, C]] is [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    """
    size = len(upper)
    if size <= COLUMN_BLOCK:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
        return solved
    half = size // 2
    first, last = inverse_triangle(upper[:half, :half]), inverse_triangle(upper[half:, half:])
    inverse = torch.zeros_like(upper)
    inverse[:half, :half], inverse[half:, half:] = first, last
    torch.mm(first @ upper[:half, half:], last, out=inverse[:half, half:]).neg_()
    return inverse


def gptq_round(weight: Tensor, gram: Tensor, nearest: Nearest) -> Tensor:
    """Round [out, in] weights to int8 codes [out, in], a column's error spread over the columns not yet rounded.

    gram: float32 [in, in] of the layer's inputs. The columns with the largest activations go first (act-order), while
    there are many left to make up for them; what `nearest` rounds to must not depend on the order.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order])
    # Columns as rows: every step then reads and writes contiguous memory.
    columns = weight.float().t()[order]
    codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    numbers = order.tolist()
    reach = factor / factor.diagonal().unsqueeze(1)  # an error over its pivot, times the pivot's row
    for start in range(0, len(columns), COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, len(columns))
        errors, found = torch.empty_like(columns[start:stop]), torch.empty_like(columns[start:stop])
        _feed_block(columns[start:stop], reach[start:stop, start:stop], numbers[start:stop], nearest, found, errors)
        codes[order[start:stop]] = found.to(torch.int8)
        columns[stop:].addmm_(reach[start:stop, stop:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def _feed_block(
    columns: Tensor, reach: Tensor, numbers: Sequence[int], nearest: Nearest, codes: Tensor, errors: Tensor
) -> None:
    """Round a block of columns [n, out], whose errors pass to each other by reach [n, n]: one half, then the other."""
    if len(columns) > SMALLEST_BLOCK:
        half = len(columns) // 2
        _feed_block(columns[:half], reach[:half, :half], numbers[:half], nearest, codes[:half], errors[:half])
        columns[half:].addmm_(reach[:half, half:].t(), errors[:half], alpha=-1)
        _feed_block(columns[half:], reach[half:, half:], numbers[half:], nearest, codes[half:], errors[half:])
        return
    rows = zip(numbers, columns.unbind(0), codes.unbind(0), errors.unbind(0), reach.unbind(0), strict=True)
    for place, (number, values, code, error, row) in enumerate(rows, start=1):
        nearest(number, values, code, error)
        columns[place:].addr_(row[place:], error, alpha=-1)


def round_with_feedback(weight: Tensor, gram: Tensor, group_size: int, clip: Tensor | None = None) -> Int4Weight:
    """Quantize [out, in] weights to groupwise 4 bits with error feedback.

    gram: float32 [in, in] of the layer's (scaled) inputs. clip: [out, in / group_size] as in round_to_nearest. The
    groups' scales and zeros are fixed before the feedback starts, by the clipped minimum and maximum.
    """
    grouped = weight.float().view(weight.shape[0], -1, group_size)
    if clip is not None:
        grouped = torch.clamp(grouped, -clip.unsqueeze(-1), clip.unsqueeze(-1))
    scales, zeros = minmax_range(grouped)
    lowest = -zeros.t().contiguous()
    ranges = list(zip(scales.t().contiguous().unbind(0), lowest.unbind(0), (lowest + LEVELS).unbind(0), strict=True))

    def nearest(column: int, values: Tensor, code: Tensor, error: Tensor) -> None:
        scale, low, high = ranges[column // group_size]
        torch.div(values, scale, out=code).round_().clamp_(low, high)
        torch.addcmul(values, code, scale, value=-1, out=error)

    offsets = gptq_round(weight, gram, nearest).view(grouped.shape)
    codes = offsets.add_(zeros.to(torch.int8).unsqueeze(-1)).view(torch.uint8).view(weight.shape)
    return Int4Weight(codes, scales.half(), zeros.to(torch.uint8))


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
