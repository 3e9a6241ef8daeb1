"""cuSZp's stream on the device: docs/format-cuszp.md in Triton.

A tile is [BLOCKS, 32]: a block a row, a value a column. The published kernels find where a block's
payload begins by a look-back over the warps before theirs. Here it is known before a kernel that
needs it starts: a first kernel sums the sizes of each tile's blocks, a prefix sum over the tiles
gives where each begins, and within a tile the sizes are summed again.

Quantizing is float32 without contraction (launch with enable_fp_fusion=False), so that the bytes
are those of the CPU; everything else is integers. Positions are 64-bit.

What keeps hostile bytes in: the caller compares the sum of all sizes with the length of the stream
before `decode_blocks` starts, and no other value leads to an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIXED, OUTLIER = tl.constexpr(0), tl.constexpr(2)
"""Modes; `plain`, 1, is neither."""

SATURATED = tl.constexpr(float(2**30 - 64))


@triton.jit
def _bins(x_at, mask, reciprocal):
    """Section 2: the bin of each value; 0 where masked, NaN or infinite."""
    x = tl.load(x_at, mask=mask, other=0.0)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    y = tl.where(magnitude < 0x7F800000, x, 0.0) * reciprocal
    shifted = tl.minimum(tl.maximum(y + 0.5, -SATURATED), SATURATED)
    return shifted.to(tl.int32) - (y < -0.5).to(tl.int32)


@triton.jit
def _differences(x, block, column, n, reciprocal, MODE: tl.constexpr):
    """[BLOCKS, 32] section 3: what a block codes; 0 behind the array's end."""
    i = block.to(tl.int64)[:, None] * 32 + column
    bins = _bins(x + i, i < n, reciprocal)
    if MODE != FIXED:
        before = _bins(x + i - 1, (column > 0) & (i < n), reciprocal)
        bins -= before
    return bins


@triton.jit
def _bit_length(value):
    """Of int32 values of at least 0."""
    length = value * 0
    for k in tl.static_range(5):
        step = 16 >> k
        far = (value >> step != 0).to(tl.int32)
        length += far * step
        value = value >> far * step
    return length + value


@triton.jit
def _size(rate, n_outlier):
    """Bytes of a block's payload."""
    return tl.where((rate > 0) | (n_outlier > 0), 4 + 4 * rate + n_outlier, 0)


@triton.jit
def _split_code(code, MODE: tl.constexpr):
    """A block's rate and bytes of its outlier, from its byte of the table."""
    rate = code & 31
    if MODE == OUTLIER:
        return rate, tl.where(code >= 128, (code >> 5 & 3) + 1, 0)
    return rate, rate * 0


@triton.jit
def _payloads(begins, code, n_table, MODE: tl.constexpr):
    """Where the payload of each of the tile's blocks begins in the stream, their rates and bytes
    of outliers."""
    rate, n_outlier = _split_code(code, MODE)
    size = _size(rate, n_outlier)
    inside = tl.cumsum(size, axis=0) - size
    return tl.load(begins + tl.program_id(0)) + n_table + inside, rate, n_outlier


@triton.jit
def _load_word(at, mask, ALIGNED: tl.constexpr):
    """4 bytes at these addresses as uint32; 0 where masked."""
    if ALIGNED:
        return tl.load(at.to(tl.pointer_type(tl.uint32), bitcast=True), mask=mask, other=0)
    word = tl.load(at, mask=mask, other=0).to(tl.uint32)
    for k in tl.static_range(1, 4):
        word |= tl.load(at + k, mask=mask, other=0).to(tl.uint32) << 8 * k
    return word


@triton.jit
def _store_word(at, bits, place, mask, ALIGNED: tl.constexpr):
    """The bits of a row, a value each, as 4 bytes at the row's address."""
    word = tl.sum(bits.to(tl.uint32) << place, axis=1)
    if ALIGNED:
        tl.store(at.to(tl.pointer_type(tl.uint32), bitcast=True), word, mask=mask)
    else:
        for k in tl.static_range(4):
            tl.store(at + k, (word >> 8 * k & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def measure_blocks(
    x,  # float32 [n]
    codes,  # uint8 [table], the beginning of the stream, to be written
    tile_sizes,  # int64, one a program, to be written
    n,
    n_table,
    reciprocal,  # float32, 0.5 / ε
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The first pass of the encoder: the table, and the bytes that each tile's payload takes."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, 32)[None, :]
    magnitudes = tl.abs(_differences(x, block, column, n, reciprocal, MODE))
    rate = _bit_length(tl.max(magnitudes, axis=1))
    code = rate
    size = _size(rate, rate * 0)
    if MODE == OUTLIER:
        others = _bit_length(tl.max(tl.where(column == 0, 0, magnitudes), axis=1))
        outlier = tl.sum(tl.where(column == 0, magnitudes, 0), axis=1)
        n_outlier = (_bit_length(outlier) + 7) // 8
        with_outlier = 4 + 4 * others + n_outlier
        code = tl.where(with_outlier < size, 128 | n_outlier - 1 << 5 | others, code)
        size = tl.minimum(with_outlier, size)
    tl.store(codes + block, code.to(tl.uint8), mask=block < n_table)
    tl.store(tile_sizes + tl.program_id(0), tl.sum(size, axis=0).to(tl.int64))


@triton.jit
def write_blocks(
    x,  # float32 [n]
    stream,  # uint8; its table is there
    begins,  # int64, where each tile's payload begins behind the table
    n,
    n_table,
    reciprocal,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The second pass: signs and planes, and outliers in front of them."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, 32)[None, :]
    code = tl.load(stream + block, mask=block < n_table, other=0).to(tl.int32)
    begin, rate, n_outlier = _payloads(begins, code, n_table, MODE)
    differences = _differences(x, block, column, n, reciprocal, MODE)
    magnitudes = tl.abs(differences)
    at = stream + begin
    if MODE == OUTLIER:
        outlier = tl.sum(tl.where(column == 0, magnitudes, 0), axis=1)
        for k in tl.static_range(4):
            byte = outlier >> 8 * k & 0xFF
            tl.store(at + k, byte.to(tl.uint8), mask=k < n_outlier)
        at += n_outlier
        magnitudes = tl.where((column == 0) & (n_outlier > 0)[:, None], 0, magnitudes)
    # The first value has the highest bit of the first byte; in a little-endian word that is:
    place = (column ^ 7).to(tl.uint32)
    _store_word(at, differences < 0, place, (rate > 0) | (n_outlier > 0), ALIGNED)
    for plane in range(tl.max(rate, axis=0)):
        at += 4
        _store_word(at, magnitudes >> plane & 1, place, plane < rate, ALIGNED)


@triton.jit
def sum_sizes(
    stream,  # uint8
    tile_sizes,  # int64, one a program, to be written
    wrong,  # int32 [1], 0; the number of tiles with a byte that no encoder writes is added
    n_blocks,
    n_table,
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The first pass of the decoder: the bytes of each tile's payload. TILES tiles a program."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    block = tile[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    code = tl.load(stream + block, mask=block < n_table, other=0).to(tl.int32)
    rate, n_outlier = _split_code(code, MODE)
    size = tl.sum(_size(rate, n_outlier), axis=1)
    tl.store(tile_sizes + tile, size.to(tl.int64), mask=tile * BLOCKS < n_table)
    known = code < 32
    if MODE == OUTLIER:
        known = known | (code >= 128)
    bad = tl.max((~known | ((block >= n_blocks) & (code > 0))).to(tl.int32), axis=1)
    n_bad = tl.sum(bad, axis=0)
    if n_bad > 0:
        tl.atomic_add(wrong, n_bad)


@triton.jit
def decode_blocks(
    stream,  # uint8
    begins,  # int64, where each tile's payload begins behind the table
    out,  # float32, or uint16 patterns, to be written
    n,
    n_table,
    step,  # float32, 2 ε
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,  # F32, BF16 or F16
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The second pass: bins from planes, values from bins, cast to the output's dtype."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, 32)[None, :]
    code = tl.load(stream + block, mask=block < n_table, other=0).to(tl.int32)
    begin, rate, n_outlier = _payloads(begins, code, n_table, MODE)
    start = stream + begin
    at = start + n_outlier
    place = (column ^ 7).to(tl.uint32)
    signs = _load_word(at, (rate > 0) | (n_outlier > 0), ALIGNED)
    magnitudes = tl.zeros([BLOCKS, 32], tl.uint32)
    for plane in range(tl.max(rate, axis=0)):
        at += 4
        word = _load_word(at, plane < rate, ALIGNED)
        magnitudes |= (word[:, None] >> place & 1) << plane
    if MODE == OUTLIER:
        outlier = tl.zeros([BLOCKS], tl.uint32)
        for k in tl.static_range(4):
            byte = tl.load(start + k, mask=k < n_outlier, other=0)
            outlier |= byte.to(tl.uint32) << 8 * k
        first = (column == 0) & (n_outlier > 0)[:, None]
        magnitudes = tl.where(first, outlier[:, None], magnitudes)
    bins = magnitudes.to(tl.int32, bitcast=True)
    bins = tl.where((signs[:, None] >> place & 1) != 0, -bins, bins)
    if MODE != FIXED:
        bins = tl.cumsum(bins, axis=1)
    value = bins.to(tl.float32) * step
    i = block.to(tl.int64)[:, None] * 32 + column
    if DTYPE == "F32":
        tl.store(out + i, value, mask=i < n)
    elif DTYPE == "F16":
        half = value.to(tl.float16)
        tl.store(out + i, half.to(tl.uint16, bitcast=True), mask=i < n)
    else:
        # By hand: the interpreter's own cast to bfloat16 truncates.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
        tl.store(out + i, rounded.to(tl.uint16), mask=i < n)
