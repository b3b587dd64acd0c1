"""Triton programs over 4-bit weights in the storage of quantize.kernels.words. Import it only where Triton is.

Common to all: words int32 [out_features, in_features / 8], eight codes each in plain order; scales float16 and zeros
uint8 [out_features, groups]; GROUP_WORDS words share one scale. A weight is (code - zero) * scale.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(words, rows, columns, out_features, width):  # type: ignore[no-untyped-def]
    """The words of these rows and columns as unsigned numbers, zero outside, and the mask: [ROWS, WORDS] each."""
    inside = (rows < out_features)[:, None] & (columns < width)[None, :]
    packed = tl.load(words + rows[:, None] * width + columns[None, :], mask=inside, other=0)
    return packed.to(tl.uint32, bitcast=True), inside


@triton.jit  # type: ignore[untyped-decorator]
def load_ranges(scales, zeros, rows, columns, inside, groups, GROUP_WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale and zero point of each of these words, float32 [ROWS, WORDS] each."""
    places = rows[:, None] * groups + (columns // GROUP_WORDS)[None, :]
    scale = tl.load(scales + places, mask=inside, other=0).to(tl.float32)
    zero = tl.load(zeros + places, mask=inside, other=0).to(tl.float32)
    return scale, zero


@triton.jit  # type: ignore[untyped-decorator]
def matvec_program(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    zeros,
    out,
    out_features,
    in_features,
    groups,
    GROUP_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One token times ROWS output features: x [tokens, in], out [tokens, out]; grid (blocks of rows, tokens).

    A code is masked where it stands in its word, which is the code times 16 to its place, and the input divided by
    the same power of two: exact, and one shift less a weight. The zero points leave the sum: sum (c - z) x =
    sum c x - z sum x.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1)
    width = in_features // 8
    x += token * in_features
    total = tl.zeros([ROWS, WORDS], dtype=tl.float32)
    for start in range(0, width, WORDS):
        columns = start + tl.arange(0, WORDS)
        packed, inside = load_words(words, rows, columns, out_features, width)
        scale, zero = load_ranges(scales, zeros, rows, columns, inside, groups, GROUP_WORDS)
        products = tl.zeros([ROWS, WORDS], dtype=tl.float32)
        inputs = tl.zeros([WORDS], dtype=tl.float32)
        for place in tl.static_range(8):
            value = tl.load(x + columns * 8 + place, mask=columns < width, other=0).to(tl.float32)
            inputs += value
            code = packed & (15 << (4 * place))
            products += code.to(tl.float32) * (value * (1.0 / (1 << (4 * place))))[None, :]
        total += scale * (products - zero * inputs[None, :])
    sums = tl.sum(total, axis=1)
    tl.store(out + token * out_features + rows, sums.to(out.dtype.element_ty), mask=rows < out_features)


@triton.jit  # type: ignore[untyped-decorator]
def tile_program(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    zeros,
    out,
    tokens,
    out_features,
    in_features,
    groups,
    GROUP_WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """TOKENS tokens times ROWS output features on the tensor cores; grid (blocks of rows, blocks of tokens).

    The eight places of a word are eight products over WORDS inputs each, eight features apart, so that no code has to
    move to another lane.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lines = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    width = in_features // 8
    total = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    for start in range(0, width, WORDS):
        columns = start + tl.arange(0, WORDS)
        packed, inside = load_words(words, rows, columns, out_features, width)
        scale, zero = load_ranges(scales, zeros, rows, columns, inside, groups, GROUP_WORDS)
        given = (lines < tokens)[:, None] & (columns < width)[None, :]
        for place in tl.static_range(8):
            value = tl.load(x + lines[:, None] * in_features + columns[None, :] * 8 + place, mask=given, other=0)
            code = ((packed >> (4 * place)) & 15).to(tl.float32)
            weight = ((code - zero) * scale).to(value.dtype)
            total += tl.dot(value, tl.trans(weight), input_precision="ieee")
    kept = (lines < tokens)[:, None] & (rows < out_features)[None, :]
    tl.store(out + lines[:, None] * out_features + rows[None, :], total.to(out.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_program(  # type: ignore[no-untyped-def]
    words,
    scales,
    zeros,
    out,
    out_features,
    in_features,
    groups,
    GROUP_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The weights themselves, out [out_features, in_features]; grid (blocks of rows, blocks of words)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    packed, inside = load_words(words, rows, columns, out_features, in_features // 8)
    scale, zero = load_ranges(scales, zeros, rows, columns, inside, groups, GROUP_WORDS)
    shifts = (tl.arange(0, 8) * 4).to(tl.uint32)
    codes = ((packed[:, :, None] >> shifts[None, None, :]) & 15).to(tl.float32)
    weights = tl.reshape((codes - zero[:, :, None]) * scale[:, :, None], [ROWS, WORDS * 8])
    features = tl.program_id(1) * WORDS * 8 + tl.arange(0, WORDS * 8)
    kept = (rows < out_features)[:, None] & (features < in_features)[None, :]
    places = rows[:, None].to(tl.int64) * in_features + features[None, :]
    tl.store(out + places, weights.to(out.dtype.element_ty), mask=kept)
