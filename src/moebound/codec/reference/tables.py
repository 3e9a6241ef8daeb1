"""The encoder's choices, part three: the frequencies, and what they sum to.

A sum of 2^12 follows the counts closest. A smaller table decodes quicker, so the sum is halved as
long as that costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from moebound.codec.reference.layout import MAX_TABLE_LOG
from moebound.codec.reference.model import BIT, Counts, fixed_log2

LEAST_TABLE_LOG = 10

MANY_WEIGHTS = 1 << 17
"""From here on, frequencies are stored with 6 bits below the leading one, not 3: what rounding
them costs against what their bits cost."""


def choose_tables(counts: Counts, n: int) -> tuple[int, int, list[list[int]], list[int]]:
    """T, p, and of each table its frequencies and the symbol that is not stored.

    counts: [n_tables, n_symbols]. A thousandth more may be paid for halving the sum where several
    tables share the cache, a ten-thousandth where one is alone.
    """
    mantissa_bits = 3 if n < MANY_WEIGHTS else 6
    of_tables: list[list[int]] = counts.tolist()
    for of_table in of_tables:
        if not any(of_table):  # no weight uses it, and still it needs a symbol
            of_table[0] = 1
    tolerance = 1000 if len(of_tables) > 1 else 10000
    best = _normalized(of_tables, MAX_TABLE_LOG, mantissa_bits)
    most = _cost(of_tables, best, MAX_TABLE_LOG)
    most += most // tolerance
    table_log = MAX_TABLE_LOG
    while table_log > LEAST_TABLE_LOG:
        smaller = _normalized(of_tables, table_log - 1, mantissa_bits)
        if _cost(of_tables, smaller, table_log - 1) > most:
            break
        table_log, best = table_log - 1, smaller
    return table_log, mantissa_bits, [table for table, _ in best], [rest for _, rest in best]


def normalize(counts: Sequence[int], table_log: int, mantissa_bits: int) -> tuple[list[int], int]:
    """Frequencies that sum to 2^table_log, at least 1 for each symbol that occurs.

    All but the first most frequent symbol's, which takes what is left and is returned, have at
    most mantissa_bits bits below their leading one.
    """
    whole, total = 1 << table_log, sum(counts)
    rest = counts.index(max(counts))
    frequencies = [0] * len(counts)
    for s, count in enumerate(counts):
        if count and s != rest:
            nearest = (2 * count * whole + total) // (2 * total)
            frequencies[s] = max(1, _round_mantissa(nearest, mantissa_bits))
    while sum(frequencies) >= whole:  # rounding up left nothing: the next ones give
        most = frequencies.index(max(frequencies))
        frequencies[most] = _round_mantissa(frequencies[most] // 2, mantissa_bits)
    frequencies[rest] = whole - sum(frequencies)
    return frequencies, rest


def _normalized(
    of_tables: list[list[int]], table_log: int, mantissa_bits: int
) -> list[tuple[list[int], int]]:
    return [normalize(counts, table_log, mantissa_bits) for counts in of_tables]


def _round_mantissa(frequency: int, mantissa_bits: int) -> int:
    """To the nearest number with so many bits below its leading one, halves up."""
    drop = frequency.bit_length() - mantissa_bits - 1
    return frequency if drop <= 0 else (frequency + (1 << (drop - 1))) >> drop << drop


def _cost(of_tables: list[list[int]], tables: list[tuple[list[int], int]], table_log: int) -> int:
    """Of coding all symbols with these frequencies."""
    return sum(
        count * (table_log * BIT - fixed_log2(frequency))
        for counts, (frequencies, _) in zip(of_tables, tables, strict=True)
        for count, frequency in zip(counts, frequencies, strict=True)
        if count
    )
