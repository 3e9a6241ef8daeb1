"""4.6: a segment. Static rANS over interleaved lanes (Duda, arXiv:1311.2540), and low bits.

A state x is one large number that symbols are pushed on and popped from. Popping reads the symbol
from x mod 2^T, where each symbol owns as many slots as its frequency, and shrinks x by just the
symbol's information. When x falls below 2^16 the next word comes in below it. The encoder does
every step backwards, the last weight first, so that the decoder goes forwards.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.layout import GROUP, Layout
from moebound.errors import CorruptionError

STATE_LOW = 1 << 16


def read_segment(
    read: ByteReader, layout: Layout, rows: range, n: int, n_words: int
) -> tuple[list[int], list[int]]:
    """The symbols and the low bits of a segment's weights, row-major. Raises CorruptionError."""
    states = np.frombuffer(read.take(4 * layout.lanes), "<u4").tolist()
    words = np.frombuffer(read.take(2 * n_words), "<u2").tolist()
    read.take(-2 * n_words % 4)
    lows = [low for row in rows for low in _read_low_bits(read, layout, layout.row_length(row, n))]
    return _decode(states, words, layout, rows, n), lows


def write_segment(
    symbols: list[list[int]], lows: list[list[int]], layout: Layout, rows: range
) -> tuple[bytes, int]:
    """The bytes of a segment and how many words it has. symbols, lows: of each row."""
    states, words = _encode(symbols, layout, rows)
    data = np.array(states, "<u4").tobytes() + np.array(words, "<u2").tobytes()
    data += bytes(-len(data) % 4)
    return data + b"".join(_low_bits(row, layout) for row in lows), len(words)


def _decode(states: list[int], words: list[int], layout: Layout, rows: range, n: int) -> list[int]:
    if min(states) < STATE_LOW:
        raise CorruptionError(f"a first state of {min(states)}, below 2^16")
    frequencies, starts = layout.tables, _starts(layout)
    symbol_at = [
        [s for s, frequency in enumerate(table) for _ in range(frequency)] for table in frequencies
    ]
    symbols, n_read = [], 0
    for row in rows:
        for j, t in enumerate(layout.tables_of_row(row)[: layout.row_length(row, n)].tolist()):
            lane = j % layout.lanes
            x = states[lane]
            slot = x % (1 << layout.table_log)
            s = symbol_at[t][slot]
            x = frequencies[t][s] * (x >> layout.table_log) + slot - starts[t][s]
            if x < STATE_LOW:
                if n_read == len(words):
                    raise CorruptionError("words end early")
                x = x << 16 | words[n_read]
                n_read += 1
            states[lane] = x
            symbols.append(s)
    if n_read < len(words) or any(x != STATE_LOW for x in states):
        raise CorruptionError("a segment does not end as it began")
    return symbols


def _encode(symbols: list[list[int]], layout: Layout, rows: range) -> tuple[list[int], list[int]]:
    """The states that the decoder begins with, and its words."""
    frequencies, starts = layout.tables, _starts(layout)
    states, words = [STATE_LOW] * layout.lanes, []
    for row, of_row in zip(reversed(rows), reversed(symbols), strict=True):
        tables = layout.tables_of_row(row).tolist()
        for j in reversed(range(len(of_row))):
            s, t = of_row[j], tables[j]
            frequency = frequencies[t][s]
            x = states[j % layout.lanes]
            if x >= frequency << (32 - layout.table_log):
                words.append(x & 0xFFFF)
                x >>= 16
            whole, left = divmod(x, frequency)
            states[j % layout.lanes] = (whole << layout.table_log) + left + starts[t][s]
    return states, words[::-1]


def _starts(layout: Layout) -> list[list[int]]:
    """Cumulative frequencies: the first slot of each symbol."""
    return [list(accumulate(table, initial=0)) for table in layout.tables]


def _read_low_bits(read: ByteReader, layout: Layout, length: int) -> list[int]:
    """The low bits of one row's weights, from their planes."""
    k, n_groups = layout.low_bits, -(-length // GROUP)
    planes = np.frombuffer(read.take(4 * k * n_groups), np.uint8).reshape(n_groups, k, 4)
    bits = np.unpackbits(planes, axis=2, bitorder="little").astype(np.int64)  # [group, plane, 32]
    weight_of_plane = (1 << np.arange(k)).reshape(1, k, 1)
    lows: list[int] = (bits * weight_of_plane).sum(axis=1).reshape(-1)[:length].tolist()
    return lows


def _low_bits(row: list[int], layout: Layout) -> bytes:
    """Planes of 32 bits for each group of one row: bit i of plane b is bit b of weight i."""
    n_groups = -(-len(row) // GROUP)
    low: npt.NDArray[np.int64] = np.zeros((n_groups, 1, GROUP), np.int64)
    low.reshape(-1)[: len(row)] = row
    planes = low >> np.arange(layout.low_bits).reshape(1, -1, 1) & 1
    return np.packbits(planes.astype(np.uint8), axis=2, bitorder="little").tobytes()
