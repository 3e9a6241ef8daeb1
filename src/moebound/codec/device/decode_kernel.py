"""The decoder on the device: a row of 32 threads decodes one segment, as a warp.

docs/format.md, section 4.6, in Triton. A tile is [SEGMENTS, 32]: a segment a row, a lane a column.
On a GPU a program is one warp with one segment, whose states stay in registers: thread i is lane i,
in the only layout that such a tile has. A step decodes up to 32 weights. Lanes whose state fell
below 2^16 take the next words in the order of their numbers, so where each reads is a count of the
lanes before it that do: one ballot and a population count, as in DietGPU
(github.com/facebookresearch/dietgpu); under the interpreter, which has no warps and takes many
segments at a time, a prefix sum.

Values are patterns from a table, and nothing is computed in floating point; but in version 2 of
codec `bound` a value is a whole number times a step, in float32, rounded to the dtype. In version 3
the step is a product itself, of a column's number and a row's: float32, as the CPU rounds it.

What keeps a hostile stream in: a slot is below 2^table_log whatever the state is; every table is
full, so that symbols and values are those of the header; a word is read only below the segment's
count of them; a store is within the array's weights. Positions and counts are the host's, checked.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of `jobs` [., 4], int64: which array, the address of its first value, the first byte of
# its envelope in the compressed bytes, and the first slot of its tables.
J_ARRAY = tl.constexpr(0)
J_ADDRESS = tl.constexpr(1)
J_BEGIN = tl.constexpr(2)
J_SLOTS = tl.constexpr(3)
JOB_FIELDS = tl.constexpr(4)

# Columns of `arrays` [., 23], int64: the header, and where the array's part of each section begins.
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
A_SEGMENTS_BEGIN = tl.constexpr(10)
A_VALUES_BEGIN = tl.constexpr(11)
A_EXACT_FROM = tl.constexpr(12)  # the lowest symbol of an exact copy, or -1
A_LOWER = tl.constexpr(13)  # where the low halves of an exact float32 copy begin, or -1
A_SYMBOLS = tl.constexpr(14)
A_SYMBOLS_BEGIN = tl.constexpr(15)
A_SEGMENTS = tl.constexpr(16)
A_PATCHES_BEGIN = tl.constexpr(17)
A_PATCHES = tl.constexpr(18)
A_SCALED = tl.constexpr(19)  # 0: not; else bits, below
A_STEPS_BEGIN = tl.constexpr(20)
A_FIRST_BIN = tl.constexpr(21)
A_FACTORS = tl.constexpr(22)  # where the numbers of the rows' factors begin, among the classes
ARRAY_FIELDS = tl.constexpr(23)

# Bits of A_SCALED: how products are rounded, and whose the steps are.
TO_HALF = tl.constexpr(1)  # float16
TO_OTHER = tl.constexpr(2)  # bfloat16, or float32 as it is
BY_ROW = tl.constexpr(4)
BOTH_SIDES = tl.constexpr(8)  # the columns', and rows have factors: a list behind these steps

# Bits of a segment's status; launch.py has them in words.
FIRST_STATE = tl.constexpr(1)
WORDS_SHORT = tl.constexpr(2)
WORDS_LEFT = tl.constexpr(4)
LAST_STATE = tl.constexpr(8)


@triton.jit
def _halves(at, mask, ALIGNED: tl.constexpr):
    """What `_u16` makes 16 bits of, as it was loaded; 0 where masked."""
    if ALIGNED:
        low = tl.load(at.to(tl.pointer_type(tl.uint16), bitcast=True), mask=mask, other=0)
        high = low
    else:
        low = tl.load(at, mask=mask, other=0)
        high = tl.load(at + 1, mask=mask, other=0)
    return low, high


@triton.jit
def _joined(low, high, ALIGNED: tl.constexpr):
    """16 bits as uint32. Apart from the load: whoever joins has to wait for it."""
    joined = low.to(tl.uint32)
    if not ALIGNED:
        joined |= high.to(tl.uint32) << 8
    return joined


@triton.jit
def _u16(at, mask, ALIGNED: tl.constexpr):
    """16 bits at these byte addresses, as uint32; 0 where masked."""
    low, high = _halves(at, mask, ALIGNED)
    return _joined(low, high, ALIGNED)


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


@triton.jit
def _section(block, begin, KIND: tl.constexpr):
    """The numbers of one kind that begin at a byte of the block."""
    return (block + begin).to(tl.pointer_type(KIND), bitcast=True)


@triton.jit
def _rounded(product, is_half, ITEM: tl.constexpr, HALVES: tl.constexpr):
    """A float32's pattern in the dtype, ties to even. It is no NaN."""
    pattern = product.to(tl.uint32, bitcast=True)
    if ITEM == 2:
        pattern = ((pattern + 0x7FFF + (pattern >> 16 & 1)) >> 16).to(tl.uint16)
        if HALVES:
            half = product.to(tl.float16).to(tl.uint16, bitcast=True)
            pattern = tl.where(is_half, half, pattern)
    return pattern


@triton.jit(
    do_not_specialize=[
        "arrays_at", "begins_at", "words_at", "classes_at", "symbols_at", "values_at", "steps_at",
        "first_job", "n_places",
    ]
)  # fmt: skip
def decode_segments(
    compressed,  # uint8
    block,  # uint8, the metadata
    jobs,  # int64 [., 4]
    slots,  # uint8 symbols; or uint32, WIDE: symbol | (frequency - 1) << 8 | bias << 20
    status,  # int32 [jobs, n_places], what is wrong with each segment; 0 is nothing
    arrays_at,  # where the sections of the block begin: int64 [., 23]
    begins_at,  # int64, of each segment, from the envelope's first byte
    words_at,  # int32, of each segment
    classes_at,  # uint8
    symbols_at,  # uint32: (frequency - 1) | cumulative frequency << 12
    values_at,  # uint16 or uint32 patterns
    steps_at,  # float32
    first_job,
    n_places,  # no job has more segments
    ITEM: tl.constexpr,  # bytes of a value
    LOW_BITS: tl.constexpr,  # the most of any array
    CLASSES: tl.constexpr,  # whether any array has more than one table
    EXACT: tl.constexpr,  # whether any array is an exact copy
    SCALED: tl.constexpr,  # whether any array has steps
    FACTORS: tl.constexpr,  # whether any of these has factors, too
    HALVES: tl.constexpr,  # whether any of these is float16
    ALIGNED: tl.constexpr,  # whether all segments begin at even addresses
    WIDE: tl.constexpr,
    BALLOT: tl.constexpr,  # for one segment and one warp
    SEGMENTS: tl.constexpr,  # a program's
):
    """Decode SEGMENTS segments of a job of values of ITEM bytes. Program (places, job)."""
    symbols = _section(block, symbols_at, tl.uint32)
    values = _section(block, values_at, tl.uint16 if ITEM == 2 else tl.uint32)
    classes = block + classes_at
    # What holds for a segment stands in all 32 columns, so that no value changes its layout.
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [SEGMENTS, 32])
    own = tl.broadcast_to(tl.arange(0, SEGMENTS)[:, None], [SEGMENTS, 32])
    lower_lanes = (tl.full([SEGMENTS, 32], 1, tl.uint32) << lane.to(tl.uint32)) - 1
    job = first_job + tl.program_id(1)
    j = jobs + job.to(tl.int64) * JOB_FIELDS
    a = _section(block, arrays_at, tl.int64) + tl.load(j + J_ARRAY) * ARRAY_FIELDS
    segment = tl.program_id(0) * SEGMENTS + own
    live = segment < tl.load(a + A_SEGMENTS)
    s = tl.load(a + A_SEGMENTS_BEGIN) + segment
    n_words = tl.load(_section(block, words_at, tl.int32) + s, mask=live, other=0)
    envelope = compressed + tl.load(j + J_BEGIN)
    states_at = envelope + tl.load(_section(block, begins_at, tl.int64) + s, mask=live, other=0)
    columns = tl.load(a + A_COLUMNS).to(tl.int32)
    rows_per_segment = tl.load(a + A_ROWS_PER_SEGMENT)
    lanes = tl.load(a + A_LANES).to(tl.int32)
    table_log = tl.load(a + A_TABLE_LOG).to(tl.uint32)
    slots_at = slots + tl.load(j + J_SLOTS)
    slot_mask = (tl.full([SEGMENTS, 32], 1, tl.uint32) << table_log) - 1
    if not WIDE:
        n_symbols = tl.load(a + A_SYMBOLS).to(tl.int32)
        symbols += tl.load(a + A_SYMBOLS_BEGIN)
    first_row = segment * rows_per_segment
    begin = first_row * columns
    n_here = tl.minimum(tl.load(a + A_WEIGHTS) - begin, rows_per_segment * columns)
    n_here = tl.where(live, n_here, 0).to(tl.int32)
    # [begin, begin + n_here) are the segment's weights.
    address = tl.load(j + J_ADDRESS) + begin * ITEM
    out = address.to(tl.pointer_type(tl.uint16 if ITEM == 2 else tl.uint32))
    stream_at = states_at + 4 * lanes
    if CLASSES:
        n_tables = tl.load(a + A_TABLES).to(tl.int32)
        base = tl.load(a + A_CLASS_BASE).to(tl.int32)
        row_class_at = classes + tl.load(a + A_ROW_CLASSES) + first_row
        column_class_at = classes + tl.load(a + A_COLUMN_CLASSES) + lane * 0
    if LOW_BITS > 0:
        low_bits = tl.load(a + A_LOW_BITS).to(tl.int32) + lane * 0
        planes_at = stream_at + ((2 * n_words + 3) // 4) * 4
        groups = (columns + 31) // 32
    value_at = values + tl.load(a + A_VALUES_BEGIN)
    if SCALED:
        scaled = tl.load(a + A_SCALED).to(tl.int32) + lane * 0
        is_scaled = scaled != 0
        by_row = (scaled & BY_ROW) != 0
        step_at = _section(block, steps_at, tl.float32) + tl.load(a + A_STEPS_BEGIN)
        step_at += tl.where(by_row, first_row, 0)
        first_bin = tl.load(a + A_FIRST_BIN).to(tl.int32) + lane * 0
        if FACTORS:
            factor_at = step_at + columns
            number_at = classes + tl.load(a + A_FACTORS) + first_row
    if EXACT:
        exact_from = tl.load(a + A_EXACT_FROM).to(tl.int32) + lane * 0
        if ITEM == 4:
            lower = tl.load(a + A_LOWER) + lane * 0
            lower_at = envelope + lower + 2 * begin

    in_use = live & (lane < lanes)
    x = _u16(states_at + 4 * lane, in_use, ALIGNED)
    x = x | _u16(states_at + 4 * lane + 2, in_use, ALIGNED) << 16
    x = tl.where(in_use, x, 65536)
    bad_start = tl.where(x < 65536, FIRST_STATE, 0)
    taken = tl.zeros([SEGMENTS, 32], tl.int32)
    n_rows = tl.max(tl.max((n_here + columns - 1) // tl.maximum(columns, 1), axis=1), axis=0)
    n_steps = (columns + lanes - 1) // lanes
    # A warp waits for its oldest use of a load. So loads that no state depends on are issued a step
    # early, and values are stored a step late: what is left to wait for is one look-up a step.
    held = tl.zeros([SEGMENTS, 32], tl.uint16 if ITEM == 2 else tl.uint32)
    held_i = lane
    held_active = lane < 0
    if BALLOT:
        ahead, ahead_high = _halves(stream_at + 2 * lane, lane < n_words, ALIGNED)
    for row in range(n_rows):
        row_begin = row * columns
        row_end = tl.minimum(row_begin + columns, n_here)
        if CLASSES:
            many = row_begin < tl.where(n_tables > 1, n_here, 0)
            row_class = tl.load(row_class_at + row, mask=many, other=0).to(tl.int32) - base
            column_class = tl.load(column_class_at + lane, mask=many & (lane < columns), other=0)
        if FACTORS:
            both = (row_begin < n_here) & ((scaled & BOTH_SIDES) != 0)
            number = tl.load(number_at + row, mask=both, other=0).to(tl.int32)
            factor = tl.load(factor_at + number, mask=both, other=1.0)
        for step in range(n_steps):
            column = step * lanes + lane
            i = row_begin + column
            active = (i < row_end) & (lane < lanes)
            if SCALED:
                which_step = tl.where(by_row, row, column)
                size = tl.load(step_at + which_step, mask=active & is_scaled, other=0)
            slot = (x & slot_mask).to(tl.int32)
            if CLASSES:
                table = tl.minimum(tl.maximum(row_class + column_class, 0), n_tables - 1)
                slot += table << table_log.to(tl.int32)
                further = column + lanes
                column_class = tl.load(
                    column_class_at + further, mask=many & (further < columns), other=0
                )
            entry = tl.load(slots_at + slot, mask=active, other=0)
            tl.store(out + held_i, held, mask=held_active)
            if WIDE:
                symbol = (entry & 0xFF).to(tl.int32)
                y = ((entry >> 8 & 0xFFF) + 1) * (x >> table_log) + (entry >> 20)
            else:
                symbol = entry.to(tl.int32)
                which = symbol
                if CLASSES:
                    which += table * n_symbols
                known = tl.load(symbols + which, mask=active, other=0)
                bias = (x & slot_mask) - (known >> 12)
                y = ((known & 0xFFF) + 1) * (x >> table_log) + bias
            wants = active & (y < 65536)
            before, together = count_before(wants.to(tl.int32), lower_lanes, BALLOT)
            if BALLOT:
                word = _from_lane(_joined(ahead, ahead_high, ALIGNED), before)
            else:
                at = taken + before
                word = _u16(stream_at + 2 * at, wants & (at < n_words), ALIGNED)
            y = tl.where(wants, y << 16 | word, y)
            x = tl.where(active, y, x)
            taken += together
            if BALLOT:
                at = taken + lane
                ahead, ahead_high = _halves(stream_at + 2 * at, at < n_words, ALIGNED)

            cell = symbol
            if LOW_BITS > 0:
                group_at = planes_at + 4 * low_bits * (row * groups + column // 32)
                cell = cell << low_bits
                for b in tl.static_range(LOW_BITS):
                    plane = group_at + 4 * b + column % 32 // 8
                    byte = tl.load(plane, mask=active & (b < low_bits), other=0).to(tl.int32)
                    cell |= (byte >> column % 8 & 1) << b
            from_table = active
            if SCALED:
                from_table = active & (scaled == 0)
            if EXACT:
                is_exact = exact_from >= 0
                value = tl.load(value_at + cell, mask=from_table & (exact_from < 0), other=0)
                rotated = (cell + (exact_from << 8)).to(tl.uint32)
                pattern = (rotated >> 1 | rotated << 15) & 0xFFFF
                if ITEM == 4:
                    below = _u16(lower_at + 2 * i, active & is_exact & (lower >= 0), False)
                    pattern = pattern << 16 | below
                held = tl.where(is_exact, pattern.to(value.dtype), value)
            else:
                held = tl.load(value_at + cell, mask=from_table, other=0)
            if SCALED:
                if FACTORS:
                    size *= factor
                product = (cell + first_bin).to(tl.float32) * size
                pattern = _rounded(product, (scaled & TO_HALF) != 0, ITEM, HALVES)
                held = tl.where(is_scaled, pattern, held)
            held_i = i
            held_active = active
    tl.store(out + held_i, held, mask=held_active)

    words = tl.where(taken > n_words, WORDS_SHORT, 0) + tl.where(taken < n_words, WORDS_LEFT, 0)
    bad_end = tl.where(x != 65536, LAST_STATE, 0)
    wrong = tl.max(bad_start, axis=1, keep_dims=True) + tl.max(bad_end, axis=1, keep_dims=True)
    wrong = tl.broadcast_to(wrong, [SEGMENTS, 32]) + words
    at = job.to(tl.int64) * n_places + segment
    tl.store(status + at, wrong, mask=(segment < n_places) & (lane == 0))


@triton.jit(do_not_specialize=["arrays_at", "symbols_at"])
def expand_tables(
    block,  # uint8, the metadata
    jobs,  # int64 [., 4]
    slots,  # to be written, as decode_segments reads them
    arrays_at,  # where the sections of the block begin: int64 [., 23]
    symbols_at,  # uint32: (frequency - 1) | cumulative frequency << 12
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of the largest table
):
    """Write every slot of every table of the jobs. Program (blocks of each table in turn, job)."""
    j = jobs + tl.program_id(1).to(tl.int64) * JOB_FIELDS
    a = _section(block, arrays_at, tl.int64) + tl.load(j + J_ARRAY) * ARRAY_FIELDS
    table = tl.program_id(0) // BLOCKS
    n_symbols = tl.load(a + A_SYMBOLS).to(tl.int32)
    symbols = _section(block, symbols_at, tl.uint32)
    symbols += tl.load(a + A_SYMBOLS_BEGIN) + table * n_symbols
    n_slots = 1 << tl.load(a + A_TABLE_LOG).to(tl.int32)
    slot = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    live = slot < tl.where(table < tl.load(a + A_TABLES), n_slots, 0)
    # The last symbol that begins at or before the slot: those without slots begin where the next
    # one does, or behind.
    symbol = tl.zeros([BLOCK], tl.int32)
    known = tl.load(symbols + symbol, mask=live, other=0)
    for k in tl.static_range(8):
        further = symbol + (128 >> k)
        there = live & (further < n_symbols)
        candidate = tl.load(symbols + further, mask=there, other=0)
        found = there & ((candidate >> 12).to(tl.int32) <= slot)
        symbol = tl.where(found, further, symbol)
        known = tl.where(found, candidate, known)
    at = slots + tl.load(j + J_SLOTS) + table * n_slots + slot
    if WIDE:
        bias = slot.to(tl.uint32) - (known >> 12)
        entry = symbol.to(tl.uint32) | (known & 0xFFF) << 8 | bias << 20
        tl.store(at, entry, mask=live)
    else:
        tl.store(at, symbol.to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=["arrays_at", "positions_at", "patches_at", "first_job"])
def lay_patches(
    block,  # uint8, the metadata
    jobs,  # int64 [., 4]
    arrays_at,  # where the sections of the block begin: int64 [., 23]
    positions_at,  # int64, flat
    patches_at,  # uint32 patterns
    first_job,
    ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the patches of jobs where they belong. Program (block of patches, job)."""
    j = jobs + (first_job + tl.program_id(1)).to(tl.int64) * JOB_FIELDS
    a = _section(block, arrays_at, tl.int64) + tl.load(j + J_ARRAY) * ARRAY_FIELDS
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < tl.load(a + A_PATCHES)
    i += tl.load(a + A_PATCHES_BEGIN)
    position = tl.load(_section(block, positions_at, tl.int64) + i, mask=live, other=0)
    address = tl.load(j + J_ADDRESS) + position * ITEM
    out = address.to(tl.pointer_type(tl.uint16 if ITEM == 2 else tl.uint32))
    value = tl.load(_section(block, patches_at, tl.uint32) + i, mask=live, other=0)
    tl.store(out, value.to(tl.uint16) if ITEM == 2 else value, mask=live)
