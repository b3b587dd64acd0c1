"""Rounding that compensates: GPTQ's error feedback (arXiv 2210.17323) inside fixed ranges, then a sweep over the codes.

Of inputs X in the source model that are X^ in the quantized one, the change of the output, |X W^T - X^ Q^T|^2, is
tr(D H D^T) - 2 tr(D B^T) and a constant: D = Q - W, H = X^^T X^, B = W (X - X^)^T X^. All here lessens it, row by row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantize.int4.weight import LEVELS, Int4Weight, minmax_range
from quantize.kernels.triton import launch, no_programs_reason
from quantize.rounding.gram import product_dtype, transposed

DAMPING = 0.05  # share of the mean diagonal added to the Gram matrix; the paper adds 0.01
MOST_DAMPING = 1e9  # with so much the matrix is its diagonal: what cannot be factorised then is not finite
COLUMN_BLOCK, FACTOR_BLOCK, TINY = 512, 1024, torch.finfo(torch.float32).tiny
SMALLEST_BLOCK, SOLVED_BLOCK = 16, 128  # blocks of columns are halved down to it, triangular systems to this
PROGRAM_BLOCK, PROGRAM_ROWS = 64, 32  # columns and rows that a Triton program has in its registers
LARGEST_STEP = 0.3  # a refitted scale moves by less than this share of itself: beyond, other codes would be nearer


@dataclass(frozen=True)
class Grid:
    """What weights may become: in each group whole numbers times its scale, or certain levels times its scale.

    size: features a group; scales: [groups, rows]; table: the lowest of 16 whole numbers, [groups, rows], or, where
    `has_levels`, [3, 16]: the levels, ascending, their codes, and the midpoints above them."""

    size: int
    scales: Tensor
    table: Tensor
    has_levels: bool = False

    @cached_property
    def _rows(self) -> list[tuple[Tensor, ...]]:
        ranges = () if self.has_levels else (self.table, self.table + LEVELS)
        return list(zip(*(one.unbind(0) for one in (self.scales, *ranges)), strict=True))

    def nearest(self, column: int, wanted: Tensor, code: Tensor, value: Tensor) -> None:
        """Write the nearest codes to what a column should be, and the values that they stand for, all [rows]."""
        scale, *reach = self._rows[column // self.size]
        if self.has_levels:
            rank = torch.bucketize(wanted / scale, self.table[2, :-1])
            torch.mul(self.table[0][rank], scale, out=value)
            code.copy_(self.table[1][rank])
        else:
            torch.div(wanted, scale, out=code).round_().clamp_(*reach)
            torch.mul(code, scale, out=value)


@dataclass(frozen=True)
class Target:
    """H for feedback. order: [in], the features with the smallest diagonal first, since rounding goes from the last to
    the first; factor: [in, in], the upper R with R^T R = H with damping, in that order."""

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor, shrinkage: float = 0) -> "Target":
        """gram: H, float32 [in, in], off its diagonal lessened by so much. Raises ArithmeticError for NaN and Inf."""
        order = torch.argsort(gram.diagonal(), stable=True)
        return cls(order, damped_factor(gram, order, shrinkage))


def damped_factor(gram: Tensor, order: Tensor | None = None, shrinkage: float = 0) -> Tensor:
    """The upper R [in, in] with R^T R = H + damping * mean(diag H) I, by Cholesky's method, the features in this order.

    Input features that never fire get a diagonal of one. Where float32 cannot factorise the matrix, float64 tries,
    then ten times the damping: the Gram matrix of few tokens is close to singular. Raises ArithmeticError for NaN, Inf.
    """
    damping, order = DAMPING, torch.arange(len(gram), device=gram.device) if order is None else order
    while damping < MOST_DAMPING:
        for dtype in (torch.float32, torch.float64):
            damped, picked = torch.empty(gram.shape, dtype=dtype, device=gram.device), gram.new_empty((0, 0))
            for rows, own in zip(*(torch.split(one, FACTOR_BLOCK) for one in (damped, order)), strict=True):
                picked = torch.index_select(gram, 0, own, out=picked.resize_((len(own), len(gram))))
                rows.copy_(picked.index_select(1, order)).mul_(1 - shrinkage)
            diagonal = damped.diagonal().copy_(gram.diagonal()[order])
            dead = diagonal <= 0
            diagonal.add_(damping * float(diagonal.mean()))
            diagonal[dead] = 1
            if _factorize(damped):
                return damped.float()
        damping *= 10
    raise ArithmeticError("the Gram matrix is not finite, so that it has no factor")


def _factorize(matrix: Tensor) -> bool:
    """Put the upper R with R^T R = A in the place of a symmetric A [n, n], block after block; whether there is one."""
    size = FACTOR_BLOCK if matrix.device.type == "cpu" else len(matrix)  # CUDA's products may be in TF32
    for start in range(0, len(matrix), size):
        own, rest = slice(start, start + size), slice(start + size, None)
        factor, failed = torch.linalg.cholesky_ex(matrix[own, own], upper=True)
        if bool(failed):
            return False
        matrix[own, own] = factor
        _solve(factor, matrix[own, rest])
        for first in range(start + size, len(matrix), size):
            panel = matrix[own, first:]
            matrix[first : first + size, first:].addmm_(panel[:, :size].t(), panel, alpha=-1)
    return bool(torch.isfinite(matrix.triu_().sum()))


def gptq_round(weight: Tensor, target: Target, grid: Grid, pull: Tensor | None = None) -> Tensor:
    """Round [rows, in] weights to int8 codes [rows, in], each column making up for the errors of those before it.

    The columns with the largest activations go first (act-order), while there are many left to make up for them.
    pull: B [rows, in], None for none. It is Babai's nearest plane algorithm (arXiv 2507.18553): with H = R^T R, column
    j is rounded from w_j + (sum_{k > j} R_jk (w_k - q_k) + T_j) / R_jj, where T R = B. The far products are in bfloat16
    where a CPU has it."""
    dtype, order = product_dtype(weight.device, weight.shape[1]), target.order
    pivots = target.factor.diagonal().unsqueeze(1)
    # Columns as rows: every step then reads and writes contiguous memory.
    columns = transposed(weight.float())[order]
    pulled = None if pull is None else _solved(target.factor, transposed(pull)[order], dtype).div_(pivots)
    codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    errors = torch.empty(columns.shape, dtype=dtype, device=weight.device)
    for stop in range(len(columns), 0, -COLUMN_BLOCK):
        start = max(0, stop - COLUMN_BLOCK)
        own = slice(start, stop)
        wanted = (target.factor[own, stop:].to(dtype) @ errors[stop:]).float().div_(pivots[own]).add_(columns[own])
        if pulled is not None:
            wanted += pulled[own]
        found, left = torch.empty_like(wanted), torch.empty_like(wanted)
        reach = target.factor[own, own] / pivots[own]
        _feed_block(wanted, columns[own], reach, order[own], grid, found, left)
        codes[order[own]] = found.to(torch.int8)
        errors[own] = left
    return transposed(codes)


def _solved(factor: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """T^T [in, rows] with R^T T^T = right, block after block; the products between blocks are in `dtype`."""
    solved, known = torch.empty_like(right), torch.empty(right.shape, dtype=dtype, device=right.device)
    for start in range(0, len(right), COLUMN_BLOCK):
        own = slice(start, start + COLUMN_BLOCK)
        torch.sub(right[own], factor[:start, own].to(dtype).t() @ known[:start], out=solved[own])
        _solve(factor[own, own], solved[own])
        known[own] = solved[own]
    return solved


def _solve(factor: Tensor, right: Tensor) -> None:
    """Put T with R^T T = B, R the upper factor [n, n], in the place of B [n, m], half after half."""
    if (half := len(factor) // 2) < SOLVED_BLOCK:
        right.copy_(torch.linalg.solve_triangular(factor.t(), right, upper=False))
        return
    _solve(factor[:half, :half], right[:half])
    right[half:].addmm_(factor[:half, half:].t(), right[:half], alpha=-1)
    _solve(factor[half:, half:], right[half:])


def _feed_block(
    wanted: Tensor, columns: Tensor, reach: Tensor, numbers: Tensor, grid: Grid, codes: Tensor, left: Tensor
) -> None:
    """Round columns [n, rows], the last half first; what is `left` of each passes to those before by reach [n, n]."""
    (count, rows), programs = columns.shape, no_programs_reason(columns.device) is None
    if count > (PROGRAM_BLOCK if programs else SMALLEST_BLOCK):
        half = count // 2
        for own in (slice(half, None), slice(None, half)):
            _feed_block(wanted[own], columns[own], reach[own, own], numbers[own], grid, codes[own], left[own])
            if own.stop is None:
                wanted[:half].addmm_(reach[:half, half:], left[half:])
    elif programs:
        from quantize.rounding.programs import feed_program

        operands = (wanted, columns, reach, numbers, grid.scales, grid.table, codes, left)
        sizes = (rows, count, reach.stride(0), grid.size, PROGRAM_BLOCK, PROGRAM_ROWS, grid.has_levels)
        launch(feed_program, (-(-rows // PROGRAM_ROWS), 1, 1), operands, sizes, num_warps=1)
    else:
        for place, column in reversed(list(enumerate(numbers.tolist()))):
            grid.nearest(column, wanted[place], codes[place], left[place])
            torch.sub(columns[place], left[place], out=left[place])
            wanted[:place].addr_(reach[:place, place], left[place])


def round_with_feedback(
    weight: Tensor, target: Target, group_size: int, clip: Tensor | None = None, pull: Tensor | None = None
) -> Int4Weight:
    """Quantize [rows, in] weights to groupwise 4 bits with error feedback.

    clip: [rows, in / group_size] as in round_to_nearest; pull: as gptq_round's. The groups' scales and zeros are fixed
    before the feedback starts, by the clipped minimum and maximum."""
    grouped = weight.float().view(weight.shape[0], -1, group_size)
    scales, zeros = minmax_range(grouped, clip)
    grid = Grid(group_size, scales.t().contiguous(), -zeros.t().contiguous())
    offsets = gptq_round(weight, target, grid, pull).view(grouped.shape)
    codes = offsets.add_(zeros.to(torch.int8).unsqueeze(-1)).view(torch.uint8).view(weight.shape)
    return Int4Weight(codes, scales.half(), zeros.to(torch.uint8))


def sweep(
    quantized: Int4Weight, weight: Tensor, gram: Tensor, pull: Tensor | None = None, *, codes_too: bool = True
) -> Int4Weight:
    """Lessen tr(D H D^T) - 2 tr(D B^T) once more, group after group: each code, then the group's scale.

    weight: float32 [rows, in]; gram: H [in, in], multiplied in its dtype; pull: B [rows, in], None for none. With
    G = D H - B, a code goes to the nearest of c - G_j / (s H_jj) (coordinate descent), and the scale moves by
    -(G c) / (c H c), the least squares of a group whose codes are c less their zero point. The scales stay float16
    numbers, and one that would move too far stays where it is. codes_too: else only the scales are fitted."""
    size = quantized.group_size
    zeros, scales = (transposed(one.float()) for one in (quantized.zeros, quantized.scales))
    of_groups = transposed(quantized.codes).float().view(len(scales), size, -1).sub_(zeros.unsqueeze(1))
    difference = (of_groups * scales.unsqueeze(1)).flatten(0, 1).sub_(transposed(weight))
    offsets, pulled = of_groups.flatten(0, 1), None if pull is None else transposed(pull)
    far, together = difference.to(gram.dtype, copy=True), max(1, COLUMN_BLOCK // size)
    for group in range(len(scales)):
        columns = slice(group * size, (group + 1) * size)
        if group % together == 0:
            near = slice(columns.start, columns.start + together * size)
            slopes = (gram[near] @ far).float()
            if pulled is not None:
                slopes -= pulled[near]
        own, scale, block = offsets[columns], scales[group], gram[columns, columns].float()
        slope, slopes = slopes[:size], slopes[size:]
        if codes_too:
            _descend(own, slope, difference[columns], block, scale, zeros[group])
        curvature = (block @ own).mul_(own).sum(dim=0).clamp_(min=TINY)
        step = slope.mul_(own).sum(dim=0).div_(curvature).neg_()
        fitted = (scale + torch.where(step.abs() < LARGEST_STEP * scale, step, 0)).half().float()
        changed = difference[columns].addcmul_(own, fitted - scale).to(gram.dtype)
        slopes += gram[columns.stop : near.stop, columns] @ (changed - far[columns])
        far[columns], scales[group] = changed, fitted
    codes = transposed(of_groups.add_(zeros.unsqueeze(1)).flatten(0, 1).to(torch.uint8))
    return Int4Weight(codes, transposed(scales).half(), quantized.zeros)


def _descend(codes: Tensor, slope: Tensor, difference: Tensor, gram: Tensor, scale: Tensor, zeros: Tensor) -> None:
    """Coordinate descent over one group's codes less their zero point [size, rows]; slope and difference follow."""
    if no_programs_reason(codes.device) is None:
        from quantize.rounding.programs import descend_program

        (count, width), size = codes.shape, 1 << (len(codes) - 1).bit_length()
        operands, sizes = (codes, slope, difference, gram, scale, zeros), (width, count, gram.stride(0), size, 16, TINY)
        launch(descend_program, (-(-width // 16), 1, 1), operands, sizes, num_warps=1)
        return
    low, inverse = -zeros, scale.reciprocal()
    high, moved = low + LEVELS, torch.empty_like(codes)
    steps = gram.diagonal().clamp(min=TINY).reciprocal().tolist()
    for start in range(0, len(codes), SMALLEST_BLOCK):
        own = slice(start, min(start + SMALLEST_BLOCK, len(codes)))
        near, reach = slope[own].clone(), gram[own, own]
        rows = zip(near.unbind(0), codes[own].unbind(0), moved[own].unbind(0), reach.unbind(0), steps[own], strict=True)
        for place, (rise, code, change, row, step) in enumerate(rows, start=1):
            better = torch.addcmul(code, rise, inverse, value=-step).round_().clamp_(low, high)
            torch.sub(better, code, out=change).mul_(scale)
            near[place:].addr_(row[place:], change)
            code.copy_(better)
        slope.addmm_(gram[:, own], moved[own])
    difference += moved
