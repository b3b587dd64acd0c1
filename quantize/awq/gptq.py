"""Rounding that compensates: GPTQ's error feedback (arXiv 2210.17323) inside fixed group ranges."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantize.awq.int4 import LEVELS, Int4Weight, minmax_range

DAMPING = 0.05
"""Share of the mean diagonal added to the Gram matrix; the paper adds 0.01."""

COLUMN_BLOCK = 128

Nearest = Callable[[int, Tensor, Tensor], Tensor]
"""(column, its values [out], where the errors go [out]) -> the nearest codes [out]. Errors: before less after."""


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor U of (H + damping * mean(diag H) I)^-1, so that the inverse is U^T U; [in, in].

    With H = V V^T for an upper V, which is the lower factor of H read backwards, U is the inverse of V.
    Input features that never fire get a diagonal of one. Where float32 cannot factorise the matrix, float64 tries,
    then ten times the damping: the Gram matrix of few tokens is close to singular.
    """
    while True:
        for dtype in (torch.float32, torch.float64):
            damped = gram.to(dtype, copy=True)
            diagonal = damped.diagonal()
            dead = diagonal <= 0
            diagonal.add_(damping * float(diagonal.mean()))
            diagonal[dead] = 1
            backwards, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not bool(failed):
                identity = torch.eye(len(damped), dtype=dtype, device=damped.device)
                upper = torch.linalg.solve_triangular(backwards.flip(0, 1), identity, upper=True)
                if bool(torch.isfinite(upper).all()):
                    factor: Tensor = upper.float()
                    return factor
        damping *= 10


def feed_back(weight: Tensor, gram: Tensor, nearest: Nearest, damping: float = DAMPING) -> Tensor:
    """Round [out, in] weights column by column, each column's error spread over the columns not yet rounded.

    gram: float32 [in, in] of the layer's inputs. The columns with the loudest inputs go first, while there are many
    left to make up for them; what `nearest` rounds to must not depend on the order. Returns the codes, int8 [out, in].
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], damping)
    # Columns as rows: every step then reads and writes contiguous memory.
    columns = weight.float().t()[order]
    in_features, out_features = columns.shape
    codes = torch.empty((in_features, out_features), dtype=torch.int8, device=weight.device)
    numbers = order.tolist()
    spread = factor / factor.diagonal().unsqueeze(1)  # an error over its pivot, times the pivot's row
    for start in range(0, in_features, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, in_features)
        errors = torch.empty((stop - start, out_features), dtype=torch.float32, device=weight.device)
        for column in range(start, stop):
            error = errors[column - start]
            codes[numbers[column]] = nearest(numbers[column], columns[column], error)
            columns[column + 1 : stop].addr_(spread[column, column + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(spread[start:stop, stop:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def round_with_feedback(
    weight: Tensor, gram: Tensor, group_size: int, clip: Tensor | None = None, damping: float = DAMPING
) -> Int4Weight:
    """Quantize [out, in] weights to groupwise 4 bits with error feedback.

    gram: float32 [in, in] of the layer's (scaled) inputs. clip: [out, in / group_size] as in round_to_nearest. The
    groups' scales and zeros are fixed before the feedback starts, by the clipped minimum and maximum.
    """
    grouped = weight.float().view(weight.shape[0], -1, group_size)
    if clip is not None:
        grouped = torch.clamp(grouped, -clip.unsqueeze(-1), clip.unsqueeze(-1))
    scales, zeros = minmax_range(grouped)
    scale_rows, lowest = scales.t().contiguous(), -zeros.t().contiguous()
    highest = lowest + LEVELS

    def nearest(column: int, values: Tensor, error: Tensor) -> Tensor:
        group = column // group_size
        code = torch.div(values, scale_rows[group]).round_().clamp_(lowest[group], highest[group])
        torch.addcmul(values, code, scale_rows[group], value=-1, out=error)
        return code

    offsets = feed_back(weight, gram, nearest, damping).view(grouped.shape)
    codes = offsets.add_(zeros.to(torch.int8).unsqueeze(-1)).view(torch.uint8).view(weight.shape)
    return Int4Weight(codes, scales.half(), zeros.to(torch.uint8))
