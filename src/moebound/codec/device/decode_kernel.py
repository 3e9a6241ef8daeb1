"""The decoder on the device: a row of 32 threads decodes one segment, as a warp.

docs/format.md, section 4.6, in Triton. A tile is [SEGMENTS, 32]: a segment a row, a lane a column,
and with as many segments as warps each warp has one and keeps its states in registers. A step
decodes up to 32 weights. Lanes whose state fell below 2^16 take the next words in the order of
their numbers, so where each reads is a count of the lanes before it that do: one ballot and a
population count, as in DietGPU (github.com/facebookresearch/dietgpu); under the interpreter, which
has no warps, a prefix sum.

Nothing is computed in floating point: values are patterns from a table.

What keeps a hostile stream in: a slot is below 2^table_log whatever the state is; every table is
full, so that symbols and values are those of the header; a word is read only below the segment's
count of them; a store is within the array's weights. Positions and counts are the host's, checked.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = 32

# Columns of `segments` [., 4], int64.
S_ARRAY, S_FIRST_ROW, S_BEGIN, S_WORDS = range(4)
SEGMENT_FIELDS = tl.constexpr(4)

# Columns of `arrays` [., 16], int64. begins: of its part of the classes, tables and values.
(
    A_WEIGHTS,
    A_COLUMNS,
    A_ROWS_PER_SEGMENT,
    A_LANES,
    A_LOW_BITS,
    A_TABLE_LOG,
    A_TABLES,
    A_CLASS_BASE,
    A_ROW_CLASSES,
    A_COLUMN_CLASSES,
    A_TABLE_BEGIN,
    A_VALUE_BEGIN,
    A_EXACT_FROM,
    A_LOWER,
) = range(14)
ARRAY_FIELDS = tl.constexpr(16)

# Columns of `tables` [., 4], int64.
T_CUMULATIVE, T_SYMBOLS, T_LOG, T_BEGIN = range(4)
TABLE_FIELDS = tl.constexpr(4)

# Bits of a segment's status.
FIRST_STATE, WORDS_SHORT, WORDS_LEFT, LAST_STATE = 1, 2, 4, 8


@triton.jit
def _u16(at, mask, ALIGNED: tl.constexpr):
    """16 bits at these byte addresses, as uint32; 0 where masked."""
    if ALIGNED:
        wide = at.to(tl.pointer_type(tl.uint16), bitcast=True)
        return tl.load(wide, mask=mask, other=0).to(tl.uint32)
    low = tl.load(at, mask=mask, other=0).to(tl.uint32)
    return low | tl.load(at + 1, mask=mask, other=0).to(tl.uint32) << 8


@triton.jit
def _count_before(wants, BALLOT: tl.constexpr):
    """How many lanes of the row with a lower number want a word, and how many all in all.

    wants: [SEGMENTS, 32] of 0 and 1, int32.
    """
    if BALLOT:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 all, below;
            setp.ne.s32 p, $2, 0;
            vote.sync.ballot.b32 all, p, 0xffffffff;
            mov.u32 below, %lanemask_lt;
            popc.b32 $1, all;
            and.b32 below, below, all;
            popc.b32 $0, below;
            }""",
            "=r,=r,r",
            [wants],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.cumsum(wants, axis=1) - wants, tl.sum(wants, axis=1, keep_dims=True) + wants * 0


@triton.jit
def decode_segments(
    compressed,  # uint8
    segments,  # int64 [., 4]
    arrays,  # int64 [., 16]
    addresses,  # int64, of each array's first value
    classes,  # uint8
    tables,  # uint32: symbol | (frequency - 1) << 8 | (slot - cumulative frequency) << 20
    values,  # uint16 or uint32 patterns
    status,  # int32 [.], what is wrong with each segment; 0 is nothing
    first_segment,
    last_segment,
    ITEM: tl.constexpr,  # bytes of a value
    LOW_BITS: tl.constexpr,  # the most of any array
    CLASSES: tl.constexpr,  # whether any array has more than one table
    EXACT: tl.constexpr,  # whether any array is an exact copy
    ALIGNED: tl.constexpr,  # whether all segments begin at even addresses
    BALLOT: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a program's; equal to the number of warps
):
    """Decode segments [first_segment, last_segment) of arrays whose values have ITEM bytes."""
    # What holds for a segment stands in all 32 columns, so that no value ever changes its layout.
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [SEGMENTS, 32])
    own = tl.broadcast_to(tl.arange(0, SEGMENTS)[:, None], [SEGMENTS, 32])
    segment = first_segment + tl.program_id(0) * SEGMENTS + own
    live = segment < last_segment
    s = segments + segment.to(tl.int64) * SEGMENT_FIELDS
    array = tl.load(s + 0, mask=live, other=0)
    first_row = tl.load(s + 1, mask=live, other=0)
    n_words = tl.load(s + 3, mask=live, other=0).to(tl.int32)
    a = arrays + array * ARRAY_FIELDS
    n = tl.load(a + 0, mask=live, other=0)
    columns = tl.load(a + 1, mask=live, other=0).to(tl.int32)
    rows_per_segment = tl.load(a + 2, mask=live, other=0).to(tl.int32)
    lanes = tl.load(a + 3, mask=live, other=1).to(tl.int32)
    table_log = tl.load(a + 5, mask=live, other=1).to(tl.uint32)
    table_at = tables + tl.load(a + 10, mask=live, other=0)
    slots = (tl.full([SEGMENTS, 32], 1, tl.uint32) << table_log) - 1
    begin = first_row * columns
    n_here = tl.minimum(n - begin, rows_per_segment.to(tl.int64) * columns).to(tl.int32)
    n_here = tl.where(live, n_here, 0)
    # [begin, begin + n_here) are the segment's weights.
    address = tl.load(addresses + array, mask=live, other=0) + begin * ITEM
    out = address.to(tl.pointer_type(tl.uint16 if ITEM == 2 else tl.uint32))
    states_at = compressed + tl.load(s + 2, mask=live, other=0)
    words_at = states_at + 4 * lanes
    if CLASSES:
        n_tables = tl.load(a + 6, mask=live, other=1).to(tl.int32)
        base = tl.load(a + 7, mask=live, other=0).to(tl.int32)
        row_class_at = classes + tl.load(a + 8, mask=live, other=0) + first_row
        column_class_at = classes + tl.load(a + 9, mask=live, other=0)
    if LOW_BITS > 0:
        low_bits = tl.load(a + 4, mask=live, other=0).to(tl.int32)
        planes_at = words_at + ((2 * n_words + 3) // 4) * 4
        groups = (columns + 31) // 32
    value_at = values + tl.load(a + 11, mask=live, other=0)
    if EXACT:
        exact_from = tl.load(a + 12, mask=live, other=-1).to(tl.int32)
        if ITEM == 4:
            lower = tl.load(a + 13, mask=live, other=-1)
            lower_at = compressed + lower + 2 * begin

    in_use = live & (lane < lanes)
    x = _u16(states_at + 4 * lane, in_use, ALIGNED)
    x = x | _u16(states_at + 4 * lane + 2, in_use, ALIGNED) << 16
    x = tl.where(in_use, x, 65536)
    bad_start = tl.where(x < 65536, 1, 0)
    taken = tl.zeros([SEGMENTS, 32], tl.int32)
    n_rows = tl.max(tl.max((n_here + columns - 1) // tl.maximum(columns, 1), axis=1), axis=0)
    n_steps = tl.max(tl.max((columns + lanes - 1) // lanes, axis=1), axis=0)
    for row in range(n_rows):
        row_begin = row * columns
        row_end = tl.minimum(row_begin + columns, n_here)
        if CLASSES:
            many = (n_tables > 1) & (row_begin < n_here)
            row_class = tl.load(row_class_at + row, mask=many, other=0).to(tl.int32) - base
        for step in range(n_steps):
            column = step * lanes + lane
            i = row_begin + column
            active = (i < row_end) & (lane < lanes)
            slot = (x & slots).to(tl.int32)
            if CLASSES:
                column_class = tl.load(column_class_at + column, mask=active & many, other=0)
                table = tl.minimum(tl.maximum(row_class + column_class, 0), n_tables - 1)
                slot += table << table_log.to(tl.int32)
            entry = tl.load(table_at + slot, mask=active, other=0)
            y = ((entry >> 8 & 0xFFF) + 1) * (x >> table_log) + (entry >> 20)
            wants = active & (y < 65536)
            before, together = _count_before(wants.to(tl.int32), BALLOT)
            at = taken + before
            word = _u16(words_at + 2 * at, wants & (at < n_words), ALIGNED)
            y = tl.where(wants, y << 16 | word, y)
            x = tl.where(active, y, x)
            taken += together

            bin = (entry & 0xFF).to(tl.int32)
            if LOW_BITS > 0:
                group_at = planes_at + 4 * low_bits * (row * groups + column // 32)
                bin = bin << low_bits
                for b in tl.static_range(LOW_BITS):
                    plane = group_at + 4 * b + column % 32 // 8
                    byte = tl.load(plane, mask=active & (b < low_bits), other=0).to(tl.int32)
                    bin |= (byte >> column % 8 & 1) << b
            if EXACT:
                is_exact = exact_from >= 0
                value = tl.load(value_at + bin, mask=active & (exact_from < 0), other=0)
                rotated = (bin + (exact_from << 8)).to(tl.uint32)
                pattern = (rotated >> 1 | rotated << 15) & 0xFFFF
                if ITEM == 4:
                    below = _u16(lower_at + 2 * i, active & is_exact & (lower >= 0), False)
                    pattern = pattern << 16 | below
                value = tl.where(is_exact, pattern.to(value.dtype), value)
            else:
                value = tl.load(value_at + bin, mask=active, other=0)
            tl.store(out + i, value, mask=active)

    words = tl.where(taken > n_words, 2, 0) + tl.where(taken < n_words, 4, 0)
    bad_end = tl.where(x != 65536, 8, 0)
    wrong = tl.max(bad_start, axis=1, keep_dims=True) + tl.max(bad_end, axis=1, keep_dims=True)
    wrong = tl.broadcast_to(wrong, [SEGMENTS, 32]) + words
    tl.store(status + segment, wrong, mask=live & (lane == 0))


@triton.jit
def expand_tables(
    tables,  # int64 [., 4]
    cumulative,  # uint16, n_symbols + 1 of each table: the last is 2^log
    entries,  # uint32, to be written
    BLOCK: tl.constexpr,
):
    """Write the entry of every slot of every table. Program (table, block of slots)."""
    t = tables + tl.program_id(0) * TABLE_FIELDS
    begin_of = cumulative + tl.load(t + 0)
    n_symbols = tl.load(t + 1).to(tl.int32)
    n_slots = 1 << tl.load(t + 2).to(tl.int32)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = slot < n_slots
    # The last symbol that begins at or before the slot: those without slots begin where it does,
    # or behind.
    symbol = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(8):
        further = symbol + (128 >> k)
        begin = tl.load(begin_of + further, mask=live & (further < n_symbols), other=65535)
        symbol = tl.where(begin.to(tl.int32) <= slot, further, symbol)
    begin = tl.load(begin_of + symbol, mask=live, other=0).to(tl.int32)
    end = tl.load(begin_of + symbol + 1, mask=live, other=1).to(tl.int32)
    entry = symbol | (end - begin - 1) << 8 | (slot - begin) << 20
    tl.store(entries + tl.load(t + 3) + slot, entry.to(tl.uint32), mask=live)


@triton.jit
def lay_patches(
    positions,  # int64, flat
    owners,  # int32, index of the array
    patches,  # uint32 patterns
    addresses,  # int64, of each array's first value
    first,
    last,
    ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put patches [first, last) where they belong."""
    i = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < last
    owner = tl.load(owners + i, mask=live, other=0)
    position = tl.load(positions + i, mask=live, other=0)
    address = tl.load(addresses + owner, mask=live, other=0) + position * ITEM
    out = address.to(tl.pointer_type(tl.uint16 if ITEM == 2 else tl.uint32))
    value = tl.load(patches + i, mask=live, other=0)
    tl.store(out, value.to(tl.uint16) if ITEM == 2 else value, mask=live)
