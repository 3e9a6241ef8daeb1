"""The encoder: from bit patterns to the payload of docs/format.md, section 4, or 5.

patterns -> bins of the grid -> symbols and low bits -> classes -> tables -> segments
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.classes import Symbols, choose_classes, count_symbols
from moebound.codec.reference.decode import EXACT_LOW_BITS
from moebound.codec.reference.formats import FORMATS, Patterns
from moebound.codec.reference.grid import MAX_CELLS, NO_BIN, bins_of, make_grid
from moebound.codec.reference.layout import MAX_LANES_LOG, Layout, write_layout
from moebound.codec.reference.model import Alphabet, choose_alphabet
from moebound.codec.reference.rans import write_segment
from moebound.codec.reference.tables import choose_tables
from moebound.types import DType

SEGMENT_WEIGHTS = 1 << 18
ALPHABET_SAMPLE = 1 << 18
"""Weights that choose the alphabet."""
CLASS_SAMPLE = 1 << 15
"""Weights that judge the classes."""

Positions = npt.NDArray[np.intp]


def encode(
    patterns: Patterns,
    *,
    source: DType,
    output: DType,
    bound: float,
    columns: int,
    segment_weights: int = SEGMENT_WEIGHTS,
) -> tuple[bytes, Positions]:
    """A payload of codec `bound`, and the flat positions of values that it does not carry.

    patterns: [n] bits of dtype source, n at least 1. columns: of the matrix they are seen as.
    bound: ε, above 0. The kernel's `bound_encode` gives the same bytes; codec `bound` takes an
    exact copy, behind a zero byte, where that is smaller.
    """
    n = len(patterns)
    magnitudes = patterns & ~patterns.dtype.type(FORMATS[source].sign)
    finite = magnitudes[magnitudes <= FORMATS[source].largest]
    grid = make_grid(source, output, bound, MAX_CELLS, up_to=int(finite.max(initial=0)))
    bins = bins_of(patterns, source, grid)
    m = len(grid.values) - 1
    sampled = bins[_weights_of(_sample_rows(n, columns, ALPHABET_SAMPLE), columns, n)]
    counts = np.bincount(sampled[sampled != NO_BIN] + m, minlength=2 * m + 1)
    alphabet = choose_alphabet(counts, n, miss_bits=FORMATS[output].n_bits + 2)
    symbols = (bins >> alphabet.low_bits) - alphabet.symbol_low
    missed = (bins == NO_BIN) | (symbols < 0) | (symbols >= alphabet.n_symbols)
    symbols = np.where(missed, alphabet.stand_in, symbols)
    lows = np.where(missed, 0, bins & ((1 << alphabet.low_bits) - 1))
    payload = _payload(symbols, lows, alphabet, columns, segment_weights)
    return payload, np.flatnonzero(missed)


def encode_lossless(patterns: Patterns, *, dtype: DType, columns: int) -> bytes:
    """A payload of codec `lossless`. patterns: [n] bits of dtype, n at least 1."""
    lower = b""
    if dtype == "F32":
        lower = patterns.astype("<u2").tobytes()
        patterns = (patterns >> np.uint32(16)).astype(np.uint16)
    bins = patterns.astype(np.int64)
    bins = (bins << 1 | bins >> 15) & 0xFFFF
    tops = bins >> EXACT_LOW_BITS
    first, last = int(tops.min()), int(tops.max())
    alphabet = Alphabet(first, last - first + 1, EXACT_LOW_BITS)
    return lower + _payload(tops - first, bins & 0xFF, alphabet, columns, SEGMENT_WEIGHTS)


def _payload(
    symbols: Symbols, lows: Symbols, alphabet: Alphabet, columns: int, segment_weights: int
) -> bytes:
    n = len(symbols)
    sampled = _sample_rows(n, columns, CLASS_SAMPLE)
    classes = choose_classes(symbols, alphabet.symbol_low, alphabet.n_symbols, columns, sampled)
    table_log, mantissa_bits, tables, rests = choose_tables(
        count_symbols(symbols, classes, alphabet.n_symbols), n
    )
    layout = Layout(
        table_log=table_log,
        lanes_log=_lanes_log(n),
        low_bits=alphabet.low_bits,
        n_tables=classes.n_tables,
        mantissa_bits=mantissa_bits,
        columns=columns,
        rows_per_segment=_rows_per_segment(n, columns, segment_weights),
        symbol_low=alphabet.symbol_low,
        n_symbols=alphabet.n_symbols,
        class_base=classes.base,
        row_classes=classes.row.tolist(),
        column_classes=classes.column.tolist(),
        tables=tables,
        rests=rests,
    )
    segments = []
    for rows in layout.segments(n):
        cuts = [slice(row * columns, (row + 1) * columns) for row in rows]
        data, n_words = write_segment(
            [symbols[cut].tolist() for cut in cuts],
            [lows[cut].tolist() for cut in cuts],
            layout,
            rows,
        )
        layout.segment_words.append(n_words)
        segments.append(data)
    return write_layout(layout) + b"".join(segments)


def _lanes_log(n: int) -> int:
    """Few lanes for few weights: each state costs about 24 bits."""
    if n < 1 << 13:
        return 0
    return 2 if n < 1 << 15 else MAX_LANES_LOG


def _rows_per_segment(n: int, columns: int, segment_weights: int) -> int:
    """Segments of at most segment_weights, or of one row, as even as can be."""
    rows = -(-n // columns)
    most = max(1, segment_weights // columns)
    return -(-rows // -(-rows // most))


def _sample_rows(n: int, columns: int, weights: int) -> list[int]:
    """Rows that stand for all: about so many weights, evenly spread, the first row among them."""
    return list(range(0, -(-n // columns), max(1, n // weights)))


def _weights_of(rows: list[int], columns: int, n: int) -> Positions:
    """The flat positions of these rows' weights."""
    flat = np.array(rows)[:, None] * columns + np.arange(columns)
    return flat[flat < n]
