"""The encoder's choices, part two: which weights share a table.

Weights of a large row are spread wider, and of a large column too: where scales multiply, their
logarithms add. Each row and column has a level, four times the log2 of its mean |symbol| over the
whole matrix's, and a weight's table is the sum of its two levels. Rows alone, columns alone, both
or neither: what is cheapest on a sample of rows, tables and classes included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.layout import MAX_TABLES
from moebound.codec.reference.model import BIT, TABLE_SYMBOL_COST, Counts, entropy

Levels = npt.NDArray[np.int64]
Symbols = npt.NDArray[np.int64]

MAX_LEVEL = 16

FIT_BIAS = 47274
"""1/(2 ln 2) bit: how much better a frequency looks on the sample that it was fitted to."""

_EIGHTHS = [
    float.fromhex(power)  # 2^(1/8), 2^(3/8), 2^(5/8), 2^(7/8)
    for power in (
        "0x1.172b83c7d517bp+0",
        "0x1.4bfdad5362a27p+0",
        "0x1.8ace5422aa0dbp+0",
        "0x1.d5818dcfba487p+0",
    )
]
_THRESHOLDS = [
    _EIGHTHS[(2 * level - 1) % 8 // 2] * 2.0 ** ((2 * level - 1) // 8)  # 2^((level - 1/2) / 4)
    for level in range(-MAX_LEVEL + 1, MAX_LEVEL + 1)
]


@dataclass(frozen=True)
class Classes:
    """The table of weight (row, column) is clamp(row + column - base, 0, n_tables - 1)."""

    n_tables: int
    base: int
    row: Levels
    column: Levels

    def tables(self, rows: Levels | slice = slice(None)) -> Levels:
        """[rows, columns] the table of each weight."""
        table = self.row[rows, None] + self.column[None, :] - self.base
        return table.clip(0, self.n_tables - 1)


def choose_classes(
    symbols: Symbols, symbol_low: int, n_symbols: int, columns: int, sampled: list[int]
) -> Classes:
    """The cheapest classes, judged on the sampled rows. symbols: [n], row-major.

    Ties go to the simpler: neither rows nor columns, rows, columns, both.
    """
    n = len(symbols)
    one_table = Classes(1, 0, np.zeros(-(-n // columns), np.int64), np.zeros(columns, np.int64))
    sizes = np.abs(symbols + symbol_low)
    if not sizes.sum():
        return one_table
    row_levels, column_levels = _levels(sizes, columns)
    candidates = [
        one_table,
        _classes(row_levels, one_table.column, n),
        _classes(one_table.row, column_levels, n),
        _classes(row_levels, column_levels, n),
    ]
    several = [one_table, *(c for c in candidates if c.n_tables > 1)]
    return min(several, key=lambda classes: _cost(symbols, classes, n_symbols, sampled))


def count_symbols(
    symbols: Symbols, classes: Classes, n_symbols: int, rows: list[int] | None = None
) -> Counts:
    """[n_tables, n_symbols] how often each table codes each symbol in these rows, or in all."""
    padded = _matrix(symbols, len(classes.column), -1)
    chosen = slice(None) if rows is None else np.array(rows)
    padded, tables = padded[chosen], classes.tables(chosen)
    coded = padded >= 0
    index = tables[coded] * n_symbols + padded[coded]
    counts = np.bincount(index, minlength=classes.n_tables * n_symbols)
    return counts.reshape(classes.n_tables, n_symbols)


def _matrix(values: Symbols, columns: int, padding: int) -> Symbols:
    """Row-major values as a matrix; the last row is padded."""
    missing = -len(values) % columns
    return np.pad(values, (0, missing), constant_values=padding).reshape(-1, columns)


def _levels(sizes: Symbols, columns: int) -> tuple[Levels, Levels]:
    """The level of each row and of each column."""
    n, total = len(sizes), float(sizes.sum())
    present = _matrix(np.ones_like(sizes), columns, 0)
    padded = _matrix(sizes, columns, 0)
    return (
        _level(padded.sum(axis=1), present.sum(axis=1), total, n),
        _level(padded.sum(axis=0), present.sum(axis=0), total, n),
    )


def _level(sums: Counts, counts: Counts, total: float, n: int) -> Levels:
    """round(4 · log2 v) for v = mean / mean of all, within -16 .. 16: by thresholds, no log."""
    with np.errstate(invalid="ignore"):  # columns beyond the last weight: 0 / 0
        v = sums.astype(np.float64) * float(n) / (total * counts.astype(np.float64))
    return np.searchsorted(_THRESHOLDS, v, side="right") - MAX_LEVEL


def _classes(row_levels: Levels, column_levels: Levels, n: int) -> Classes:
    """Classes for these levels; those of a side that is not told apart are all 0."""
    low, high = _table_range(row_levels, column_levels, n)
    row_low, column_low = int(row_levels.min()), int(column_levels.min())
    return Classes(
        n_tables=high - low + 1,
        base=max(0, low - row_low - column_low),
        row=row_levels - row_low,
        column=column_levels - column_low,
    )


def _table_range(row_levels: Levels, column_levels: Levels, n: int) -> tuple[int, int]:
    """The levels, row's + column's, that have a table of their own.

    Those beyond share the last: each end is drawn in until it has weights enough to pay for a
    table, and then until there are 16, the end with fewer weights first.
    """
    offset = 2 * MAX_LEVEL
    rows = np.bincount(row_levels + MAX_LEVEL, minlength=offset + 1)
    columns = np.bincount(column_levels + MAX_LEVEL, minlength=offset + 1)
    weights = np.convolve(rows, columns).tolist()
    enough = max(n // 128, 256)
    low, high = 0, len(weights) - 1
    below, above = weights[low], weights[high]
    while low < high and below < enough:
        low += 1
        below += weights[low]
    while high > low and above < enough:
        high -= 1
        above += weights[high]
    while high - low + 1 > MAX_TABLES:
        if below <= above:
            low += 1
            below += weights[low]
        else:
            high -= 1
            above += weights[high]
    return low - offset, high - offset


def _cost(symbols: Symbols, classes: Classes, n_symbols: int, sampled: list[int]) -> int:
    """Of all weights, their tables and their classes."""
    counts = count_symbols(symbols, classes, n_symbols, sampled)
    n_parameters = int(np.count_nonzero(counts))
    coded = sum(entropy(table) for table in counts.tolist()) + n_parameters * FIT_BIAS
    scale = float(len(symbols)) / float(int(counts.sum()))
    cost = int(float(coded) * scale) + n_parameters * TABLE_SYMBOL_COST
    if classes.n_tables > 1:
        for side in (classes.row, classes.column):
            cost += len(side) * int(side.max()).bit_length() * BIT
    return cost
