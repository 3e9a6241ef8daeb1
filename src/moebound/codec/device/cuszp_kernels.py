"""cuSZp's stream on the device: docs/format-cuszp.md in Triton.

A block of 32 values is a warp's: tiles are [BLOCKS, 32] with as many warps as blocks, so that each
thread has one value, and later one word of the payload. What holds for a block stands in all its 32
columns: no value ever changes its layout. Between values and words lie sums over a row: a word is
the sum of its bits, and a word is handed to all columns as the sum of itself and zeros. On an
NVIDIA GPU from compute capability 8.0 such a sum is one instruction.

The published kernels find where a payload begins by a look-back over the warps before. Here
`place_blocks` sums sizes within chunks as soon as all rates are known, and a prefix sum over the
chunks does the rest. Positions are 64-bit.

Quantizing is float32 without contraction (launch with enable_fp_fusion=False), so that the bytes
are those of the CPU; everything else is integers.

What keeps hostile bytes in: the caller compares the sum of all sizes with the length of the stream
before `decode_blocks` starts, and no other value leads to an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIXED, OUTLIER = tl.constexpr(0), tl.constexpr(2)
"""Modes; `plain`, 1, is neither."""

CHUNK_BLOCKS = tl.constexpr(1024)
INTERPRETED = triton.knobs.runtime.interpret
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
    """Section 3: what a block codes; 0 behind the array's end."""
    i = block * 32 + column
    bins = _bins(x + i, i < n, reciprocal)
    if MODE != FIXED:
        bins -= _bins(x + i - 1, (column > 0) & (i < n), reciprocal)
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
def _of_row(summed):
    """[BLOCKS, 1] as [BLOCKS, 32]."""
    return tl.broadcast_to(summed, [summed.shape[0], 32])


@triton.jit
def _of_column(value, column, which):
    """The row's value in one column, in all columns."""
    return _of_row(tl.sum(tl.where(column == which, value, 0), axis=1, keep_dims=True))


@triton.jit
def _word(bits, column):
    """The word that a row's bits make, one a value, in all columns."""
    # The first value has the highest bit of the first byte; in a little-endian word that is:
    return _of_row(tl.sum(bits << (column ^ 7), axis=1, keep_dims=True))


@triton.jit
def _bit_of(word, column):
    """The column's bit of a word that stands in all columns."""
    return word >> (column ^ 7) & 1


@triton.jit
def _split_code(code, MODE: tl.constexpr):
    """A block's rate and bytes of its outlier, from its byte of the table."""
    rate = code & 31
    if MODE == OUTLIER:
        return rate, tl.where(code >= 128, (code >> 5 & 3) + 1, 0)
    return rate, rate * 0


@triton.jit
def _tile(BLOCKS: tl.constexpr, ROUNDS: tl.constexpr):
    """Each row's first block, the columns, and the chunk that all blocks of the program are of.

    A row does ROUNDS blocks, one after the other; what there is for each block, such as its rate,
    is loaded or stored for all of them at once, a round a column.
    """
    row = tl.broadcast_to(tl.arange(0, BLOCKS)[:, None], [BLOCKS, 32])
    column = tl.broadcast_to(tl.arange(0, 32)[None, :], [BLOCKS, 32])
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * ROUNDS)
    return first + row * ROUNDS, column, first // CHUNK_BLOCKS


@triton.jit
def measure_blocks(
    x,  # float32 [n]
    codes,  # uint8, a byte for each block, to be written
    n,
    n_blocks,
    reciprocal,  # float32, 0.5 / ε
    MODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The encoder's first pass: the table of rates."""
    first, column, _ = _tile(BLOCKS, ROUNDS)
    codes_found = tl.zeros([BLOCKS, 32], tl.int32)
    for r in range(ROUNDS):
        magnitude = tl.abs(_differences(x, first + r, column, n, reciprocal, MODE))
        code = _bit_length(_of_row(tl.max(magnitude, axis=1, keep_dims=True)))
        if MODE == OUTLIER:
            others = tl.where(column == 0, 0, magnitude)
            rate = _bit_length(_of_row(tl.max(others, axis=1, keep_dims=True)))
            n_outlier = (_bit_length(_of_column(magnitude, column, 0)) + 7) // 8
            smaller = (code > 0) & (4 * rate + n_outlier < 4 * code)
            code = tl.where(smaller, 128 | n_outlier - 1 << 5 | rate, code)
        codes_found = tl.where(column == r, code, codes_found)
    block = first + column
    mask = (column < ROUNDS) & (block < n_blocks)
    tl.store(codes + block, codes_found.to(tl.uint8), mask=mask)


@triton.jit
def place_blocks(
    codes,  # uint8
    inside,  # int32, where each block's payload begins in its chunk's, to be written
    sizes,  # int64, bytes of each chunk's payload, to be written
    planes,  # int32, the highest rate of each chunk, to be written
    wrong,  # int32 [1]; the number of chunks with a byte that no encoder writes is added
    n_blocks,
    MODE: tl.constexpr,
):
    """Where payloads begin. Program: a chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    block = chunk * CHUNK_BLOCKS + tl.arange(0, CHUNK_BLOCKS)
    code = tl.load(codes + block).to(tl.int32)
    rate, n_outlier = _split_code(code, MODE)
    size = tl.where((rate > 0) | (n_outlier > 0), 4 + 4 * rate + n_outlier, 0)
    tl.store(inside + block, tl.cumsum(size, axis=0) - size)
    tl.store(sizes + chunk, tl.sum(size, axis=0).to(tl.int64))
    tl.store(planes + chunk, tl.max(rate, axis=0))
    known = code < 32
    if MODE == OUTLIER:
        known = known | (code >= 128)
    bad = tl.max((~known | ((block >= n_blocks) & (code > 0))).to(tl.int32), axis=0)
    if bad > 0:
        tl.atomic_add(wrong, bad)


@triton.jit
def write_blocks(
    x,  # float32 [n]
    stream,  # uint8; its table is there
    begins,  # int64, where each chunk's payload begins in the stream
    inside,  # int32, of place_blocks
    planes,  # int32, of place_blocks
    n,
    n_blocks,
    reciprocal,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether all payloads are, by 4
    BLOCKS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The encoder's second pass: signs and planes, and outliers in front of them."""
    first, column, chunk = _tile(BLOCKS, ROUNDS)
    mask = (column < ROUNDS) & (first + column < n_blocks)
    codes = tl.load(stream + first + column, mask=mask, other=0).to(tl.int32)
    places = tl.load(inside + first + column, mask=mask, other=0)
    payloads = stream + tl.load(begins + chunk)
    n_planes = tl.load(planes + chunk)
    for r in range(ROUNDS):
        rate, n_outlier = _split_code(_of_column(codes, column, r), MODE)
        at = payloads + _of_column(places, column, r)
        difference = _differences(x, first + r, column, n, reciprocal, MODE)
        magnitude = tl.abs(difference)
        if MODE == OUTLIER:
            outlier = _of_column(magnitude, column, 0) >> 8 * (column & 3)
            tl.store(at + column, (outlier & 0xFF).to(tl.uint8), mask=column < n_outlier)
            at += n_outlier
            magnitude = tl.where((column == 0) & (n_outlier > 0), 0, magnitude)
        # Each column collects one word: the signs, then the planes, the lowest first.
        words = _word((difference < 0).to(tl.int32), column)
        for plane in range(n_planes):
            words = tl.where(column == plane + 1, _word(magnitude >> plane & 1, column), words)
        mask = (column <= rate) & ((rate > 0) | (n_outlier > 0))
        if ALIGNED:
            tl.store(at.to(tl.pointer_type(tl.int32), bitcast=True) + column, words, mask=mask)
        else:
            for k in tl.static_range(4):
                byte = (words >> 8 * k & 0xFF).to(tl.uint8)
                tl.store(at + 4 * column + k, byte, mask=mask)


@triton.jit
def decode_blocks(
    stream,  # uint8
    begins,  # int64, where each chunk's payload begins in the stream
    inside,  # int32, of place_blocks
    planes,  # int32, of place_blocks
    out,  # float32, or uint16 patterns, to be written
    n,
    n_blocks,
    step,  # float32, 2 ε
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,  # F32, BF16 or F16
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The decoder: bins from planes, values from bins, cast to the output's dtype."""
    first, column, chunk = _tile(BLOCKS, ROUNDS)
    mask = (column < ROUNDS) & (first + column < n_blocks)
    codes = tl.load(stream + first + column, mask=mask, other=0).to(tl.int32)
    places = tl.load(inside + first + column, mask=mask, other=0)
    payloads = stream + tl.load(begins + chunk)
    n_planes = tl.load(planes + chunk)
    for r in range(ROUNDS):
        rate, n_outlier = _split_code(_of_column(codes, column, r), MODE)
        start = payloads + _of_column(places, column, r)
        at = start + n_outlier
        mask = (column <= rate) & ((rate > 0) | (n_outlier > 0))
        if ALIGNED:
            wide = at.to(tl.pointer_type(tl.int32), bitcast=True)
            words = tl.load(wide + column, mask=mask, other=0)
        else:
            words = tl.zeros([BLOCKS, 32], tl.int32)
            for k in tl.static_range(4):
                byte = tl.load(at + 4 * column + k, mask=mask, other=0)
                words |= byte.to(tl.int32) << 8 * k
        bins = tl.zeros([BLOCKS, 32], tl.int32)
        for plane in range(n_planes):
            bins |= _bit_of(_of_column(words, column, plane + 1), column) << plane
        if MODE == OUTLIER:
            byte = tl.load(start + column, mask=column < n_outlier, other=0).to(tl.int32)
            outlier = _of_row(tl.sum(byte << 8 * (column & 3), axis=1, keep_dims=True))
            bins = tl.where((column == 0) & (n_outlier > 0), outlier, bins)
        negative = _bit_of(_of_column(words, column, 0), column)
        bins = tl.where(negative != 0, -bins, bins)
        if MODE != FIXED:
            bins = tl.cumsum(bins, axis=1)
        value = bins.to(tl.float32) * step
        i = (first + r) * 32 + column
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
