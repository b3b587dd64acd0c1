"""Triton programs that choose codes column after column, which torch would ask a GPU for a dozen times a column.

Import it only where Triton is. Common to both: columns stand as rows, [count, rows], one program takes ROWS of the
rows; a block of columns fills registers, COUNT by ROWS, and what a column leaves is added to all others at once.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def whole(number):
    """To the nearest whole number, half to even: so large a float32 has no digits after the point."""
    return (number + 12582912.0) - 12582912.0


@triton.jit
def feed_program(
    wanted, columns, reach, numbers, scales, table, codes, left, rows, count, stride, size,
    COUNT: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The last step of quantize.rounding.gptq's `_feed_block`; reach [count, count] has this stride."""
    row, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COUNT)
    inside = row < rows
    held = (place < count)[:, None] & inside[None, :]
    tile = tl.load(wanted + place[:, None] * rows + row[None, :], mask=held, other=0)
    for done in range(count):
        at = count - 1 - done
        own = tl.sum(tl.where((place == at)[:, None], tile, 0), axis=0)
        group = tl.load(numbers + at) // size * rows
        scale = tl.load(scales + group + row, mask=inside, other=1)
        if LEVELS:
            midpoints = tl.load(table + 32 + tl.arange(0, 16))
            rank = tl.sum((own / scale)[None, :] > midpoints[:, None], axis=0)
            code, value = tl.load(table + 16 + rank), tl.load(table + rank) * scale
        else:
            lowest = tl.load(table + group + row, mask=inside, other=0)
            code = tl.minimum(tl.maximum(whole(own / scale), lowest), lowest + 15)
            value = code * scale
        error = tl.load(columns + at * rows + row, mask=inside, other=0) - value
        tl.store(codes + at * rows + row, code, mask=inside)
        tl.store(left + at * rows + row, error, mask=inside)
        share = tl.load(reach + place * stride + at, mask=place < at, other=0)
        tile += share[:, None] * error[None, :]


@triton.jit
def descend_program(
    codes, slope, difference, gram, scale, zeros, rows, count, stride, COUNT: tl.constexpr, ROWS: tl.constexpr, TINY
):
    """quantize.rounding.gptq's `_descend`; gram [count, count] has this stride."""
    row, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COUNT)
    inside = row < rows
    here, held = place[:, None] * rows + row[None, :], (place < count)[:, None] & inside[None, :]
    tile = tl.load(slope + here, mask=held, other=0)
    step = tl.load(scale + row, mask=inside, other=1)
    lowest = -tl.load(zeros + row, mask=inside, other=0)
    for at in range(count):
        rise = tl.sum(tl.where((place == at)[:, None], tile, 0), axis=0)
        code = tl.load(codes + at * rows + row, mask=inside, other=0)
        curvature = tl.maximum(tl.load(gram + at * stride + at), TINY)
        better = tl.minimum(tl.maximum(whole(code - rise / curvature / step), lowest), lowest + 15)
        change = (better - code) * step
        tl.store(codes + at * rows + row, better, mask=inside)
        moved = tl.load(difference + at * rows + row, mask=inside, other=0) + change
        tl.store(difference + at * rows + row, moved, mask=inside)
        row_of = tl.load(gram + place * stride + at, mask=place < count, other=0)
        tile += row_of[:, None] * change[None, :]
    tl.store(slope + here, tile, mask=held)
