"""The decoder on the device: a row of 32 threads decodes one segment, as a warp.

docs/format.md, section 4.6, in Triton. A tile is [SEGMENTS, 32]: a segment a row, a lane a column.
On a GPU a program is one warp with one segment, whose states stay in registers: thread i is lane i,
in the only layout that such a tile has. A step decodes up to 32 weights. Lanes whose state fell
below 2^16 take the next words in the order of their numbers, so where each reads is a count of the
lanes before it that do: one ballot and a population count, as in DietGPU
(github.com/facebookresearch/dietgpu); under the interpreter, which has no warps and takes many
segments at a time, a prefix sum.

Nothing is computed in floating point: values are patterns from a table.

What keeps a hostile stream in: a slot is below 2^table_log whatever the state is; every table is
full, so that symbols and values are those of the header; a word is read only below the segment's
count of them; a store is within the array's weights. Positions and counts are the host's, checked.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of `segments` [., 4], int64: whose it is, its first row, first byte and number of words.
S_ARRAY = tl.constexpr(0)
S_FIRST_ROW = tl.constexpr(1)
S_BEGIN = tl.constexpr(2)
S_WORDS = tl.constexpr(3)
SEGMENT_FIELDS = tl.constexpr(4)

# Columns of `arrays` [., 16], int64: the header, and where the array's part of each section begins.
A_WEIGHTS = tl.constexpr(0)
A_COLUMNS = tl.constexpr(1)
A_ROWS_PER_SEGMENT = tl.constexpr(2)
A_LANES = tl.constexpr(3)
A_LOW_BITS = tl.constexpr(4)
A_TABLE_LOG = tl.constexpr(5)
A_TABLES = tl.constexpr(6)
A_CLASS_BASE = tl.constexpr(7)
A_ROW_CLASSES = tl.constexpr(8)
A_COLUMN_CLASSES = tl.constexpr(9)
A_TABLE_BEGIN = tl.constexpr(10)
A_VALUE_BEGIN = tl.constexpr(11)
A_EXACT_FROM = tl.constexpr(12)  # the lowest symbol of an exact copy, or -1
A_LOWER = tl.constexpr(13)  # where the low halves of an exact float32 copy begin, or -1
ARRAY_FIELDS = tl.constexpr(16)

# Columns of `tables` [., 4], int64: where its cumulative frequencies and its entries begin.
T_CUMULATIVE = tl.constexpr(0)
T_SYMBOLS = tl.constexpr(1)
T_LOG = tl.constexpr(2)
T_BEGIN = tl.constexpr(3)
TABLE_FIELDS = tl.constexpr(4)

# Bits of a segment's status; launch.py has them in words.
FIRST_STATE = tl.constexpr(1)
WORDS_SHORT = tl.constexpr(2)
WORDS_LEFT = tl.constexpr(4)
LAST_STATE = tl.constexpr(8)


@triton.jit
def _u16(at, mask, ALIGNED: tl.constexpr):
    """uint16 at these byte addresses; 0 where masked."""
    if ALIGNED:
        return tl.load(at.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0)
    low = tl.load(at, mask=mask, other=0).to(tl.uint16)
    return low | tl.load(at + 1, mask=mask, other=0).to(tl.uint16) << 8


@triton.jit
def count_before(wants, lower_lanes, BALLOT: tl.constexpr):
    """How many lanes of the row with a lower number want a word, and how many all in all.

    wants: [SEGMENTS, 32] of 0 and 1, int32. lower_lanes: a bit for each lane with a lower number.
    """
    if BALLOT:
        tl.static_assert(wants.shape[0] == 1, "a ballot is among the lanes of one segment")
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 all, lower;
            setp.ne.s32 p, $2, 0;
            vote.sync.ballot.b32 all, p, 0xffffffff;
            and.b32 lower, all, $3;
            popc.b32 $0, lower;
            popc.b32 $1, all;
            }""",
            "=&r,=&r,r,r",
            [wants, lower_lanes],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.cumsum(wants, axis=1) - wants, tl.sum(wants, axis=1, keep_dims=True) + wants * 0


@triton.jit
def _from_lane(x, lane):
    """x of another lane of the same warp, each its own choice."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
        "=r,r,r",
        [x, lane],
        dtype=tl.uint32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["first_segment", "last_segment"])
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
    BALLOT: tl.constexpr,  # for one segment and one warp
    AHEAD: tl.constexpr,  # whether lanes load the next 32 words early and pass them on; with BALLOT
    SEGMENTS: tl.constexpr,  # a program's
):
    """Decode segments [first_segment, last_segment) of arrays whose values have ITEM bytes."""
    # What holds for a segment stands in all 32 columns, so that no value changes its layout.
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [SEGMENTS, 32])
    own = tl.broadcast_to(tl.arange(0, SEGMENTS)[:, None], [SEGMENTS, 32])
    lower_lanes = (tl.full([SEGMENTS, 32], 1, tl.uint32) << lane.to(tl.uint32)) - 1
    segment = first_segment + tl.program_id(0) * SEGMENTS + own
    live = segment < last_segment
    s = segments + segment.to(tl.int64) * SEGMENT_FIELDS
    array = tl.load(s + S_ARRAY, mask=live, other=0)
    first_row = tl.load(s + S_FIRST_ROW, mask=live, other=0)
    n_words = tl.load(s + S_WORDS, mask=live, other=0).to(tl.int32)
    a = arrays + array * ARRAY_FIELDS
    n = tl.load(a + A_WEIGHTS, mask=live, other=0)
    columns = tl.load(a + A_COLUMNS, mask=live, other=0).to(tl.int32)
    rows_per_segment = tl.load(a + A_ROWS_PER_SEGMENT, mask=live, other=0).to(tl.int32)
    lanes = tl.load(a + A_LANES, mask=live, other=1).to(tl.int32)
    table_log = tl.load(a + A_TABLE_LOG, mask=live, other=1).to(tl.uint32)
    table_at = tables + tl.load(a + A_TABLE_BEGIN, mask=live, other=0)
    slots = (tl.full([SEGMENTS, 32], 1, tl.uint32) << table_log) - 1
    begin = first_row * columns
    n_here = tl.minimum(n - begin, rows_per_segment.to(tl.int64) * columns).to(tl.int32)
    n_here = tl.where(live, n_here, 0)
    # [begin, begin + n_here) are the segment's weights.
    address = tl.load(addresses + array, mask=live, other=0) + begin * ITEM
    out = address.to(tl.pointer_type(tl.uint16 if ITEM == 2 else tl.uint32))
    states_at = compressed + tl.load(s + S_BEGIN, mask=live, other=0)
    words_at = states_at + 4 * lanes
    if CLASSES:
        n_tables = tl.load(a + A_TABLES, mask=live, other=1).to(tl.int32)
        base = tl.load(a + A_CLASS_BASE, mask=live, other=0).to(tl.int32)
        row_class_at = classes + tl.load(a + A_ROW_CLASSES, mask=live, other=0) + first_row
        column_class_at = classes + tl.load(a + A_COLUMN_CLASSES, mask=live, other=0)
    if LOW_BITS > 0:
        low_bits = tl.load(a + A_LOW_BITS, mask=live, other=0).to(tl.int32)
        planes_at = words_at + ((2 * n_words + 3) // 4) * 4
        groups = (columns + 31) // 32
    value_at = values + tl.load(a + A_VALUE_BEGIN, mask=live, other=0)
    if EXACT:
        exact_from = tl.load(a + A_EXACT_FROM, mask=live, other=-1).to(tl.int32)
        if ITEM == 4:
            lower = tl.load(a + A_LOWER, mask=live, other=-1)
            lower_at = compressed + lower + 2 * begin

    in_use = live & (lane < lanes)
    x = _u16(states_at + 4 * lane, in_use, ALIGNED).to(tl.uint32)
    x = x | _u16(states_at + 4 * lane + 2, in_use, ALIGNED).to(tl.uint32) << 16
    x = tl.where(in_use, x, 65536)
    bad_start = tl.where(x < 65536, FIRST_STATE, 0)
    taken = tl.zeros([SEGMENTS, 32], tl.int32)
    n_rows = tl.max(tl.max((n_here + columns - 1) // tl.maximum(columns, 1), axis=1), axis=0)
    n_steps = tl.max(tl.max((columns + lanes - 1) // lanes, axis=1), axis=0)
    # A warp waits for its oldest use of a load. So loads that no state depends on are issued a step
    # early, and values are stored a step late: what is left to wait for is one look-up a step.
    held = tl.zeros([SEGMENTS, 32], tl.uint16 if ITEM == 2 else tl.uint32)
    held_i = lane
    held_active = lane < 0
    if AHEAD:
        ahead = _u16(words_at + 2 * lane, lane < n_words, ALIGNED)
    for row in range(n_rows):
        row_begin = row * columns
        row_end = tl.minimum(row_begin + columns, n_here)
        if CLASSES:
            many = (n_tables > 1) & (row_begin < n_here)
            row_class = tl.load(row_class_at + row, mask=many, other=0).to(tl.int32) - base
            column_class = tl.load(column_class_at + lane, mask=many & (lane < columns), other=0)
        for step in range(n_steps):
            column = step * lanes + lane
            i = row_begin + column
            active = (i < row_end) & (lane < lanes)
            slot = (x & slots).to(tl.int32)
            if CLASSES:
                table = tl.minimum(tl.maximum(row_class + column_class, 0), n_tables - 1)
                slot += table << table_log.to(tl.int32)
                further = column + lanes
                column_class = tl.load(
                    column_class_at + further, mask=many & (further < columns), other=0
                )
            entry = tl.load(table_at + slot, mask=active, other=0)
            tl.store(out + held_i, held, mask=held_active)
            y = ((entry >> 8 & 0xFFF) + 1) * (x >> table_log) + (entry >> 20)
            wants = active & (y < 65536)
            before, together = count_before(wants.to(tl.int32), lower_lanes, BALLOT)
            if AHEAD:
                word = _from_lane(ahead.to(tl.uint32), before)
            else:
                at = taken + before
                word = _u16(words_at + 2 * at, wants & (at < n_words), ALIGNED).to(tl.uint32)
            y = tl.where(wants, y << 16 | word, y)
            x = tl.where(active, y, x)
            taken += together
            if AHEAD:
                ahead = _u16(words_at + 2 * (taken + lane), taken + lane < n_words, ALIGNED)

            cell = (entry & 0xFF).to(tl.int32)
            if LOW_BITS > 0:
                group_at = planes_at + 4 * low_bits * (row * groups + column // 32)
                cell = cell << low_bits
                for b in tl.static_range(LOW_BITS):
                    plane = group_at + 4 * b + column % 32 // 8
                    byte = tl.load(plane, mask=active & (b < low_bits), other=0).to(tl.int32)
                    cell |= (byte >> column % 8 & 1) << b
            if EXACT:
                is_exact = exact_from >= 0
                value = tl.load(value_at + cell, mask=active & (exact_from < 0), other=0)
                rotated = (cell + (exact_from << 8)).to(tl.uint32)
                pattern = (rotated >> 1 | rotated << 15) & 0xFFFF
                if ITEM == 4:
                    below = _u16(lower_at + 2 * i, active & is_exact & (lower >= 0), False)
                    pattern = pattern << 16 | below.to(tl.uint32)
                held = tl.where(is_exact, pattern.to(value.dtype), value)
            else:
                held = tl.load(value_at + cell, mask=active, other=0)
            held_i = i
            held_active = active
    tl.store(out + held_i, held, mask=held_active)

    words = tl.where(taken > n_words, WORDS_SHORT, 0) + tl.where(taken < n_words, WORDS_LEFT, 0)
    bad_end = tl.where(x != 65536, LAST_STATE, 0)
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
    begin_of = cumulative + tl.load(t + T_CUMULATIVE)
    n_symbols = tl.load(t + T_SYMBOLS).to(tl.int32)
    n_slots = 1 << tl.load(t + T_LOG).to(tl.int32)
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
    tl.store(entries + tl.load(t + T_BEGIN) + slot, entry.to(tl.uint32), mask=live)


@triton.jit(do_not_specialize=["first", "last"])
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
