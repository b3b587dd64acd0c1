"""Triton programs over 4-bit weights in the storage of quantize.kernels.block_packing. Import it only where Triton is.

Common to all: words int32 [out_features, 16 * blocks], a block being 128 input features; scales float16 and zeros
uint8 [out_features, groups]; GROUP input features share one of each, 32, 64 or a multiple of 128. A weight is
(code - zero) * scale. SIXTEEN is quantize.kernels.triton.SIXTEEN, handed over at every launch: were it a constant
of the program, the `&` and the `|` of `code_pair` would be two instructions in place of one.

The shapes of the mat-vec's loads are what makes Triton give a thread 16 bytes at a time and leave every value with the
thread that multiplies it: neighbours in memory are the last dimension, and no other dimension is as dense.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def turned(packed):
    """Words int32 -> uint32, turned left by three bits: the code at place p then begins at bit 4 p + 3."""
    words = packed.to(tl.uint32, bitcast=True)
    return (words << 3) | (words >> 29)


@triton.jit
def code_pair(words, SIXTEEN, PLACE: tl.constexpr):
    """The codes at places PLACE and PLACE + 4 of turned words, as floats, with 16 added, or 256 at an odd place.

    A code is no number yet when it has been cut out of its word; set into the digits of the float 16.0 or 256.0 it is
    16 + code or 256 + code, without an instruction that converts."""
    if PLACE == 0:
        low, high = words << 16, words
    elif PLACE == 3:
        low, high = words, (words << 16) | (words >> 16)
    else:
        low, high = words << 8, words >> 8
    if PLACE % 2 == 0:
        low, high = low & 0x00780000 | SIXTEEN, high & 0x00780000 | SIXTEEN
    else:
        low, high = low & 0x00078000 | SIXTEEN + 0x02000000, high & 0x00078000 | SIXTEEN + 0x02000000
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def matvec_program(
    x, words, scales, zeros, out, out_features, in_features, groups, SIXTEEN,
    GROUP: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """One token times ROWS output features: x [tokens, in], out [tokens, out]; grid (blocks of rows, tokens).

    A thread takes quads of words, 32 codes, against the same 32 inputs for all ROWS. Zero points and offsets leave the
    sum: sum (c - z) x = sum (c + o) x - sum o x - z sum x, the last two common to all rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    x += token * in_features
    width = tl.cdiv(in_features, 128) * 4
    total = tl.zeros([ROWS, QUADS], dtype=tl.float32)
    for start in range(0, width, QUADS):
        quads = start + tl.arange(0, QUADS)
        columns = start * 4 + tl.arange(0, QUADS * 4)
        inside = (rows < out_features)[:, None] & (columns < width * 4)[None, :]
        packed = turned(tl.load(words + rows[:, None] * (width * 4) + columns[None, :], mask=inside, other=0))
        for place in tl.static_range(4):
            first = quads // 4 * 128 + place * 32
            if place * 32 % GROUP == 0:
                known = (first < in_features)[:, None] & (rows < out_features)[None, :]
                group = (first // GROUP)[:, None] + rows[None, :] * groups
                scale = tl.load(scales + group, mask=known, other=0).to(tl.float32)
                zero = tl.load(zeros + group, mask=known, other=0).to(tl.float32)
                products = tl.zeros([ROWS, QUADS * 4], dtype=tl.float32)
                inputs = tl.zeros([QUADS * 4], dtype=tl.float32)
                offsets = tl.zeros([QUADS * 4], dtype=tl.float32)
            at = (first + quads % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
            values = tl.load(x + at, mask=at < in_features, other=0).to(tl.float32)
            even, odd = tl.split(tl.reshape(values, [QUADS * 4, 2]))
            low, high = code_pair(packed, SIXTEEN, place)
            products += low * even[None, :]
            products += high * odd[None, :]
            inputs += even + odd
            offsets += (even + odd) * (16.0 if place % 2 == 0 else 256.0)
            if (place + 1) * 32 % GROUP == 0 or place == 3:
                shifts, sums = tl.reshape(offsets, [QUADS, 4]), tl.reshape(inputs, [QUADS, 4])
                fixed = tl.sum(shifts, axis=1)[None, :] + tl.trans(zero) * tl.sum(sums, axis=1)[None, :]
                total += tl.trans(scale) * (tl.sum(tl.reshape(products, [ROWS, QUADS, 4]), axis=2) - fixed)
    totals = tl.sum(total, axis=1).to(out.dtype.element_ty)
    tl.store(out + token * out_features + rows, totals, mask=rows < out_features)


@triton.jit
def weights_at(
    packed, scales, zeros, block, last, MAGIC, PLACE: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights [ROWS, 16, 2] at one place of a block's words [ROWS, 16].

    Set into the digits of a half 1024.0 or a bfloat16 128.0, which MAGIC holds twice, both codes are numbers at once;
    less their zero point they still are whole. last: the last group, for those beyond it, of words without inputs."""
    CODE: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    WIDE: tl.constexpr = tl.float16 if dtype == tl.float16 else tl.float32
    lifted = (packed >> 4 * PLACE) & 0x000F000F | MAGIC
    low, high = lifted.to(tl.uint16).to(CODE, bitcast=True), (lifted >> 16).to(tl.uint16).to(CODE, bitcast=True)
    group = tl.minimum(block * 128 // GROUP + PLACE * 32 // GROUP, last)
    scale = tl.load(scales + group).to(WIDE)
    zero = tl.load(zeros + group).to(tl.float32) + (128.0 if dtype == tl.bfloat16 else 1024.0)
    codes = tl.join(low, high) - zero.to(CODE)[:, None, None]
    return (codes.to(WIDE) * scale[:, None, None]).to(dtype)


@triton.jit
def block_weights(
    words, scales, zeros, rows, block, blocks, groups, MAGIC, ROWS: tl.constexpr, GROUP: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The weights [ROWS, 128] of these rows and a block of inputs."""
    places = (rows * (blocks * 16))[:, None] + block * 16 + tl.arange(0, 16)[None, :]
    packed = tl.load(words + places).to(tl.uint32, bitcast=True)
    scales, zeros = scales + rows * groups, zeros + rows * groups
    first = weights_at(packed, scales, zeros, block, groups - 1, MAGIC, 0, GROUP, dtype)
    second = weights_at(packed, scales, zeros, block, groups - 1, MAGIC, 1, GROUP, dtype)
    third = weights_at(packed, scales, zeros, block, groups - 1, MAGIC, 2, GROUP, dtype)
    fourth = weights_at(packed, scales, zeros, block, groups - 1, MAGIC, 3, GROUP, dtype)
    placed = tl.join(tl.join(first, third), tl.join(second, fourth))  # [ROWS, 16, 2, 2, 2], the place last
    return tl.reshape(tl.permute(placed, (0, 3, 4, 1, 2)), [ROWS, 128])


@triton.jit
def tile_program(
    x, words, scales, zeros, out, tokens, out_features, in_features, groups, MAGIC, SPLIT,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS output features times TOKENS tokens on the tensor cores; grid (blocks of rows, blocks of tokens, SPLIT).

    out: [SPLIT, tokens, out_features], sums over a share of the inputs each. WHOLE: no block of inputs is cut off.
    Rows and tokens beyond the last are others once more, so that the loop needs no mask; they are not stored."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lines = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # their places may pass 2**31
    part, inputs, blocks = tl.program_id(2), tl.arange(0, 128), tl.cdiv(in_features, 128)
    own, each = rows % out_features, tl.cdiv(blocks, SPLIT)
    x += (lines % tokens * in_features)[None, :] + inputs[:, None]
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for block in range(part * each, tl.minimum(part * each + each, blocks)):
        if WHOLE:
            values = tl.load(x + block * 128)
        else:
            values = tl.load(x + block * 128, mask=(inputs < in_features - block * 128)[:, None], other=0)
        weights = block_weights(words, scales, zeros, own, block, blocks, groups, MAGIC, ROWS, GROUP, values.dtype)
        total = tl.dot(weights, values, total, input_precision="ieee")
    kept = (rows < out_features)[:, None] & (lines < tokens)[None, :]
    out += (part * tokens + lines)[None, :] * out_features + rows[:, None]
    tl.store(out, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def dequantize_program(
    words, scales, zeros, out, start, out_features, in_features, groups, MAGIC, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weights from row `start` on, out [out_features, in_features]; grid (blocks of rows, blocks of inputs)."""
    rows, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    own, inputs = start + rows % out_features, block * 128 + tl.arange(0, 128)
    dtype: tl.constexpr = out.dtype.element_ty
    blocks = tl.cdiv(in_features, 128)
    weights = block_weights(words, scales, zeros, own, block, blocks, groups, MAGIC, ROWS, GROUP, dtype)
    kept = (rows < out_features)[:, None] & (inputs < in_features)[None, :]
    tl.store(out + (rows.to(tl.int64) * in_features)[:, None] + inputs[None, :], weights, mask=kept)
