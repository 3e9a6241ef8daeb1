"""The encoder on the device: quantize by look-up, code one segment a warp, put the bytes together.

docs/format.md, section 4.6, backwards: from the last weight to the first, from states of 2^16.
Where a state would leave 32 bits its low word goes in front of the words; lanes of one step in the
order of their numbers, so that the decoder finds each where it counts it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebound.codec.device.decode_kernel import count_before


@triton.jit(do_not_specialize=["n"])
def look_up_codes(
    patterns,  # uint16 [n]
    codes,  # uint32 [2^16]: symbol | low << 8 | missed << 16
    symbols,  # uint8 [n], to be written
    lows,  # uint8 [n], to be written
    missed,  # uint8 [n], to be written: 1 where the code only stands in
    n,
    BLOCK: tl.constexpr,
):
    """Every weight's symbol and low bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    pattern = tl.load(patterns + i, mask=live, other=0).to(tl.int32)
    code = tl.load(codes + pattern, mask=live, other=0)
    tl.store(symbols + i, (code & 0xFF).to(tl.uint8), mask=live)
    tl.store(lows + i, (code >> 8 & 0xFF).to(tl.uint8), mask=live)
    tl.store(missed + i, (code >> 16).to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=["n", "columns", "rows_per_segment", "n_segments"])
def encode_segments(
    symbols,  # uint8 [n]
    entries,  # uint32 [n_tables, n_symbols]: (frequency - 1) | cumulative frequency << 12
    row_classes,  # uint8
    column_classes,  # uint8
    words,  # uint16 [n]: each segment's words, at the end of its weights' places
    n_words,  # int32 [n_segments], to be written
    states,  # uint32 [n_segments, 32], to be written: what the decoder begins with
    n,
    columns,
    rows_per_segment,
    n_segments,
    n_symbols,
    n_tables,
    class_base,
    TABLE_LOG: tl.constexpr,
    LANES: tl.constexpr,
    CLASSES: tl.constexpr,
    BALLOT: tl.constexpr,  # for one segment and one warp
    SEGMENTS: tl.constexpr,  # a program's
):
    """Code segments from their last weight to their first."""
    lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [SEGMENTS, 32])
    own = tl.broadcast_to(tl.arange(0, SEGMENTS)[:, None], [SEGMENTS, 32])
    lower_lanes = (tl.full([SEGMENTS, 32], 1, tl.uint32) << lane.to(tl.uint32)) - 1
    segment = tl.program_id(0) * SEGMENTS + own
    live = segment < n_segments
    first_row = segment * rows_per_segment
    begin = first_row.to(tl.int64) * columns
    n_most = rows_per_segment * columns
    n_here = tl.minimum(tl.maximum(n - begin, 0), n_most).to(tl.int32)
    n_here = tl.where(live, n_here, 0)
    words_end = words + begin + n_here
    in_use = lane < LANES
    x = tl.full([SEGMENTS, 32], 65536, tl.uint32)
    taken = tl.zeros([SEGMENTS, 32], tl.int32)
    n_steps = (columns + LANES - 1) // LANES
    for rows_done in range(rows_per_segment):
        row = rows_per_segment - 1 - rows_done
        row_begin = row * columns
        row_end = tl.minimum(row_begin + columns, n_here)
        if CLASSES:
            occupied = row_begin < n_here
            row_class = tl.load(row_classes + first_row + row, mask=occupied, other=0)
            row_class = row_class.to(tl.int32) - class_base
        for steps_done in range(n_steps):
            column = (n_steps - 1 - steps_done) * LANES + lane
            i = row_begin + column
            active = (i < row_end) & in_use
            symbol = tl.load(symbols + begin + i, mask=active, other=0).to(tl.int32)
            if CLASSES:
                column_class = tl.load(column_classes + column, mask=active, other=0)
                table = row_class + column_class.to(tl.int32)
                symbol += tl.minimum(tl.maximum(table, 0), n_tables - 1) * n_symbols
            entry = tl.load(entries + symbol, mask=active, other=0)
            frequency = (entry & 0xFFF) + 1
            spills = active & (x >> (32 - TABLE_LOG) >= frequency)
            before, together = count_before(spills.to(tl.int32), lower_lanes, BALLOT)
            taken += together
            word = (x & 0xFFFF).to(tl.uint16)
            tl.store(words_end - taken + before, word, mask=spills)
            y = tl.where(spills, x >> 16, x)
            whole = y // frequency
            y = (whole << TABLE_LOG) + (y - whole * frequency) + (entry >> 12)
            x = tl.where(active, y, x)
    tl.store(states + segment * 32 + lane, x, mask=live & in_use)
    tl.store(n_words + segment, taken, mask=live & (lane == 0))


@triton.jit(do_not_specialize=["n", "columns", "rows_per_segment", "n_segments"])
def assemble_segments(
    states,  # uint32 [n_segments, 32]
    words,  # uint16 [n], as encode_segments left them
    n_words,  # int32 [n_segments]
    lows,  # uint8 [n]
    offsets,  # int64 [n_segments], of each segment in out, in 16-bit halves; even
    out,  # uint16, to be written
    n,
    columns,
    rows_per_segment,
    LANES: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Put one segment's states, words and planes behind one another. One program a segment."""
    segment = tl.program_id(0)
    begin = segment.to(tl.int64) * rows_per_segment * columns
    n_here = tl.minimum(n - begin, rows_per_segment * columns).to(tl.int32)
    count = tl.load(n_words + segment)
    at = out + tl.load(offsets + segment)
    lane = tl.arange(0, 32)
    state = tl.load(states + segment * 32 + lane)
    tl.store(at + 2 * lane, (state & 0xFFFF).to(tl.uint16), mask=lane < LANES)
    tl.store(at + 2 * lane + 1, (state >> 16).to(tl.uint16), mask=lane < LANES)
    at += 2 * LANES
    first = words + begin + n_here - count
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tl.store(at + k, tl.load(first + k, mask=k < count, other=0), mask=k < count + count % 2)
    if LOW_BITS > 0:
        at += count + count % 2
        groups_per_row = (columns + 31) // 32
        left = n_here % columns
        n_groups = n_here // columns * groups_per_row + (left + 31) // 32
        for start in range(0, n_groups, GROUPS):
            group = start + tl.arange(0, GROUPS)[:, None]
            column = group % groups_per_row * 32 + lane[None, :]
            i = group // groups_per_row * columns + column
            inside = (column < columns) & (i < n_here)
            low = tl.load(lows + begin + i, mask=inside, other=0).to(tl.uint32)
            for b in tl.static_range(LOW_BITS):
                plane = tl.sum((low >> b & 1) << lane[None, :].to(tl.uint32), axis=1)
                halves = at + 2 * (LOW_BITS * (start + tl.arange(0, GROUPS)) + b)
                there = start + tl.arange(0, GROUPS) < n_groups
                tl.store(halves, (plane & 0xFFFF).to(tl.uint16), mask=there)
                tl.store(halves + 1, (plane >> 16).to(tl.uint16), mask=there)
