"""Triton programs of a decode step's small parts. Import it only where Triton is.

Sizes beside a width (SIZE, HALF) are the next power of two, which Triton's ranges want.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def norm_program(x, weight, out, width, epsilon, SIZE: tl.constexpr):
    """weight * x / rms(x) of every row, x and out [rows, width]; grid (rows)."""
    row, places = tl.program_id(0).to(tl.int64) * width, tl.arange(0, SIZE)
    inside = places < width
    values = tl.load(x + row + places, mask=inside, other=0).to(tl.float32)
    factors = tl.load(weight + places, mask=inside, other=0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon) * factors
    tl.store(out + row + places, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotary_program(
    queries, keys, cosine, sine, out, query_heads, query_stride, key_stride, angle_stride, half, HALF: tl.constexpr
):
    """x cos + rotate_half(x) sin, of queries and keys alike; grid (heads of both, batch), out [batch, heads, 2 half].

    queries, keys: one token's, a head's features together and heads one after another; the strides are of the batch."""
    head, batch, places = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, HALF)
    inside = places < half
    if head < query_heads:
        source = queries + batch * query_stride + head * half * 2
    else:
        source = keys + batch * key_stride + (head - query_heads) * half * 2
    low = tl.load(source + places, mask=inside).to(tl.float32)
    high = tl.load(source + half + places, mask=inside).to(tl.float32)
    cosine, sine = cosine + batch * angle_stride + places, sine + batch * angle_stride + places
    first = low * tl.load(cosine, mask=inside) - high * tl.load(sine, mask=inside)
    second = high * tl.load(cosine + half, mask=inside) + low * tl.load(sine + half, mask=inside)
    out += (batch * tl.num_programs(0) + head) * half * 2 + places
    tl.store(out, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + half, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def slot_program(
    keys, values, position, kept_keys, kept_values, key_stride, value_stride, slots, key_width, value_width,
    KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One token's keys and values into a cache [batch, heads, slots, width], at a position; grid (heads, batch)."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = (batch * tl.num_programs(0) + head) * slots + tl.load(position)
    at = tl.arange(0, KEY)
    key = tl.load(keys + batch * key_stride + head * key_width + at, mask=at < key_width)
    tl.store(kept_keys + slot * key_width + at, key, mask=at < key_width)
    at = tl.arange(0, VALUE)
    value = tl.load(values + batch * value_stride + head * value_width + at, mask=at < value_width)
    tl.store(kept_values + slot * value_width + at, value, mask=at < value_width)
