"""4.2, 4.4, 4.5, 4.7, 4.8: everything in front of the segments, read and written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.bits import (
    BitReader,
    BitWriter,
    ByteReader,
    in_range,
    put_varint,
    unzigzag,
    zigzag,
)
from moebound.codec.reference.steps import (
    MOST_LEVEL,
    STRETCH_OF_LEVEL,
    stretched_table,
)
from moebound.errors import CorruptionError

MAX_TABLE_LOG = 12
MAX_LANES_LOG = 5
MAX_LOW_BITS = 8
MAX_TABLES = 16
MAX_CLASS_BITS = 6
MAX_COLUMNS = 1 << 16
MAX_SEGMENT_WEIGHTS = 1 << 18
MAX_SYMBOL_LOW = 1 << 18
"""Of its zigzag."""
MAX_SYMBOLS = 256
GROUP = 32
SCALED, BY_ROW, CLASSES_BY_LEVEL, STRETCHED, FACTORS = 128, 1, 2, 4, 8
"""First byte of a payload of version 2 or 3, and what is added to it."""
ALL_ALIKE, MOST_RICE = 255, 7


@dataclass(kw_only=True)
class Scaling:
    """What version 2 says beyond version 1. Names are those of docs/format.md, section 4.7.

    kappa: float16's bits. levels: of each column, or row. classes_by_level: they are the classes.
    stretch: None where tables are stored. factors: levels of the other side, of version 3; None of
    version 2.
    """

    by_row: bool
    kappa: int
    levels: list[int] = field(default_factory=list)
    classes_by_level: bool = False
    stretch: int | None = None
    factors: list[int] | None = None


@dataclass(kw_only=True)
class Layout:
    """What a header says. Names and order are those of docs/format.md, section 4.2.

    row_classes, column_classes: empty if there is one table.
    tables: [n_tables][n_symbols] frequencies, each table's sum 2^table_log.
    rests: of each table, the symbol whose frequency is not stored.
    segment_words: 16-bit words of each segment. scaling: of version 2.
    """

    table_log: int = 0
    lanes_log: int
    low_bits: int
    n_tables: int = 1
    mantissa_bits: int = 0
    columns: int
    rows_per_segment: int
    symbol_low: int
    n_symbols: int
    class_base: int = 0
    row_classes: list[int] = field(default_factory=list)
    column_classes: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    rests: list[int] = field(default_factory=list)
    segment_words: list[int] = field(default_factory=list)
    scaling: Scaling | None = None

    @property
    def lanes(self) -> int:
        return 1 << self.lanes_log

    def n_rows(self, n: int) -> int:
        return -(-n // self.columns)

    def segments(self, n: int) -> list[range]:
        """The rows of each segment of n weights."""
        rows, step = self.n_rows(n), self.rows_per_segment
        return [range(first, min(first + step, rows)) for first in range(0, rows, step)]

    def row_length(self, row: int, n: int) -> int:
        """Weights in a row; the last one may be shorter."""
        return min(self.columns, n - row * self.columns)

    def tables_of_row(self, row: int) -> npt.NDArray[np.int64]:
        """4.4: which table each column of a row uses."""
        if self.n_tables == 1:
            return np.zeros(self.columns, np.int64)
        table = self.row_classes[row] + np.array(self.column_classes, np.int64) - self.class_base
        return table.clip(0, self.n_tables - 1)


def read_layout(read: ByteReader, n: int) -> Layout:
    """Parse the header in front of n weights. Raises CorruptionError."""
    scaling = _read_scaling(read) if read.data[read.at : read.at + 1] >= bytes([SCALED]) else None
    mantissa_bits = 0
    if scaling is None:
        table_log, lanes_log, low_bits, n_tables = read.take(4)
    else:
        logs, counts = read.take(2)
        table_log, lanes_log, low_bits, n_tables = (
            logs % 16,
            logs // 16,
            counts % 16,
            counts // 16 + 1,
        )
    if scaling is None or scaling.stretch is None:
        mantissa_bits = read.byte("mantissa bits", 0, MAX_TABLE_LOG)
    in_range("log2 of a table's sum", table_log, 1, MAX_TABLE_LOG)
    in_range("log2 of the lanes", lanes_log, 0, MAX_LANES_LOG)
    in_range("low bits", low_bits, 0, MAX_LOW_BITS)
    in_range("tables", n_tables, 1, MAX_TABLES)
    columns = read.varint("columns", 1, MAX_COLUMNS)
    rows_per_segment = read.varint("rows per segment", 1, MAX_SEGMENT_WEIGHTS // columns)
    symbol_low = unzigzag(read.varint("the lowest symbol", 0, MAX_SYMBOL_LOW))
    n_symbols = read.varint("symbols", 1, MAX_SYMBOLS)
    layout = Layout(
        table_log=table_log,
        lanes_log=lanes_log,
        low_bits=low_bits,
        n_tables=n_tables,
        mantissa_bits=mantissa_bits,
        columns=columns,
        rows_per_segment=rows_per_segment,
        symbol_low=symbol_low,
        n_symbols=n_symbols,
        scaling=scaling,
    )
    if scaling is not None:
        sides = layout.n_rows(n), columns
        scaling.levels = _read_levels(read, sides[not scaling.by_row])
        if scaling.factors is not None:
            scaling.factors = _read_levels(read, sides[scaling.by_row])
    if n_tables > 1:
        layout.class_base = read.byte("the classes' base", 0, 255)
        if scaling is not None and scaling.classes_by_level:
            layout.row_classes, layout.column_classes = _by_level(layout, scaling, n)
        else:
            layout.row_classes = _read_classes(read, layout.n_rows(n))
            layout.column_classes = _read_classes(read, columns)
    if scaling is not None and scaling.stretch is not None:
        scaling.stretch = read.byte("the stretch", 0, 255)
        in_range("symbols of a stretched table", n_symbols, 1, 1 << table_log)
        layout.tables = [
            stretched_table(
                scaling.stretch + STRETCH_OF_LEVEL * t, symbol_low, n_symbols, low_bits, table_log
            )
            for t in range(n_tables)
        ]
    else:
        bits = BitReader(read)
        for _ in range(n_tables):
            frequencies, rest = _read_table(bits, layout)
            layout.tables.append(frequencies)
            layout.rests.append(rest)
    for _ in layout.segments(n):
        layout.segment_words.append(read.varint("words", 0, MAX_SEGMENT_WEIGHTS))
    read.take(-read.at % 4)
    return layout


def write_layout(layout: Layout) -> bytes:
    """The header; the segments follow it."""
    scaling = layout.scaling
    stretched = scaling is not None and scaling.stretch is not None
    if scaling is None:
        out = bytearray((layout.table_log, layout.lanes_log, layout.low_bits, layout.n_tables))
    else:
        flags = BY_ROW * scaling.by_row + CLASSES_BY_LEVEL * scaling.classes_by_level
        flags += STRETCHED * stretched + FACTORS * (scaling.factors is not None)
        out = bytearray([SCALED + flags])
        out += scaling.kappa.to_bytes(2, "little")
        out.append(layout.table_log + 16 * layout.lanes_log)
        out.append(layout.low_bits + 16 * (layout.n_tables - 1))
    if not stretched:
        out.append(layout.mantissa_bits)
    put_varint(out, layout.columns)
    put_varint(out, layout.rows_per_segment)
    put_varint(out, zigzag(layout.symbol_low))
    put_varint(out, layout.n_symbols)
    if scaling is not None:
        _write_levels(out, scaling.levels)
        if scaling.factors is not None:
            _write_levels(out, scaling.factors)
    if layout.n_tables > 1:
        out.append(layout.class_base)
        if scaling is None or not scaling.classes_by_level:
            _write_classes(out, layout.row_classes)
            _write_classes(out, layout.column_classes)
    if scaling is not None and scaling.stretch is not None:
        out.append(scaling.stretch)
    else:
        bits = BitWriter(out)
        for frequencies, rest in zip(layout.tables, layout.rests, strict=True):
            _write_table(bits, frequencies, rest, layout)
    for n_words in layout.segment_words:
        put_varint(out, n_words)
    return bytes(out) + bytes(-len(out) % 4)


def _read_scaling(read: ByteReader) -> Scaling:
    flags = read.byte("flags", SCALED, SCALED + BY_ROW + CLASSES_BY_LEVEL + STRETCHED + FACTORS)
    return Scaling(
        by_row=bool(flags & BY_ROW),
        classes_by_level=bool(flags & CLASSES_BY_LEVEL),
        stretch=0 if flags & STRETCHED else None,  # until its byte comes
        factors=[] if flags & FACTORS else None,
        kappa=int.from_bytes(read.take(2), "little"),
    )


def _by_level(layout: Layout, scaling: Scaling, n: int) -> tuple[list[int], list[int]]:
    """Row and column classes where levels are the classes."""
    n_others = layout.columns if scaling.by_row else layout.n_rows(n)
    classes, others = (
        [min(level, (1 << MAX_CLASS_BITS) - 1) for level in levels]
        for levels in (scaling.levels, scaling.factors or [0] * n_others)
    )
    return (classes, others) if scaling.by_row else (others, classes)


def _read_levels(read: ByteReader, count: int) -> list[int]:
    """Rice codes of the differences to one of them."""
    r, centre = read.take(2)
    if r == ALL_ALIKE:
        return [centre] * count
    in_range("Rice's parameter", r, 0, MOST_RICE)
    bits = BitReader(read)
    levels = []
    for _ in range(count):
        code = bits.ones() << r
        level = centre + unzigzag(code | bits.take(r))
        levels.append(in_range("a level", level, 0, MOST_LEVEL))
    return levels


def _write_levels(out: bytearray, levels: list[int]) -> None:
    """With the centre and the parameter that take the fewest bits."""
    lowest, highest = min(levels), max(levels)
    if lowest == highest:
        out += bytes((ALL_ALIKE, lowest))
        return
    counts = np.bincount(levels, minlength=highest + 1).tolist()

    def n_bits(choice: tuple[int, int]) -> int:
        centre, r = choice
        return sum(
            count * ((zigzag(level - centre) >> r) + 1 + r) for level, count in enumerate(counts)
        )

    centre, r = min(
        ((c, r) for c in range(lowest, highest + 1) for r in range(MOST_RICE + 1)), key=n_bits
    )
    out += bytes((r, centre))
    bits = BitWriter(out)
    for level in levels:
        code = zigzag(level - centre)
        bits.put_ones(code >> r)
        bits.put(code & ((1 << r) - 1), r)


def _read_classes(read: ByteReader, count: int) -> list[int]:
    n_bits = read.byte("bits of a class", 0, MAX_CLASS_BITS)
    bits = BitReader(read)
    return [bits.take(n_bits) for _ in range(count)]


def _write_classes(out: bytearray, classes: list[int]) -> None:
    n_bits = max(classes).bit_length()
    out.append(n_bits)
    bits = BitWriter(out)
    for c in classes:
        bits.put(c, n_bits)


def _read_table(bits: BitReader, layout: Layout) -> tuple[list[int], int]:
    """4.5: one table's frequencies, and the symbol that takes what the others leave."""
    rest = in_range("the symbol that is not stored", bits.take(8), 0, layout.n_symbols - 1)
    frequencies = [0] * layout.n_symbols
    length = layout.table_log - 1
    for s in range(layout.n_symbols):
        if s == rest:
            continue
        length = in_range(
            "bits of a frequency", length + unzigzag(bits.ones()), 0, layout.table_log
        )
        if length == 0:
            continue
        below = length - 1
        stored = min(below, layout.mantissa_bits)
        frequencies[s] = (1 << stored | bits.take(stored)) << (below - stored)
    frequencies[rest] = (1 << layout.table_log) - sum(frequencies)
    if frequencies[rest] < 1:
        raise CorruptionError(f"a table's frequencies exceed {1 << layout.table_log}")
    return frequencies, rest


def _write_table(bits: BitWriter, frequencies: list[int], rest: int, layout: Layout) -> None:
    bits.put(rest, 8)
    length = layout.table_log - 1
    for s, frequency in enumerate(frequencies):
        if s == rest:
            continue
        change, length = frequency.bit_length() - length, frequency.bit_length()
        bits.put_ones(zigzag(change))
        below = max(length - 1, 0)
        stored = min(below, layout.mantissa_bits)
        bits.put(frequency >> (below - stored), stored)  # without the leading one
