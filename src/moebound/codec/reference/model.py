"""The encoder's choices, part one: the alphabet. And what costs are counted in.

Bins reach ±2^15 and a table has 256 symbols, so an alphabet decides two things: how many low bits
to store as they are (they are noise where bins are fine), and which window of the rest to give
symbols. What is outside it goes to the envelope's patch.

Costs are in units of 1/65536 bit, in integers, with a log2 in fixed point: libm's log2 may differ
in its last bit from machine to machine, and then so would the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.layout import MAX_LOW_BITS, MAX_SYMBOLS, MAX_TABLE_LOG

Counts = npt.NDArray[np.int64]

BIT = 1 << 16
"""The cost of one bit."""

TABLE_SYMBOL_COST = 6 * BIT
"""About what a frequency costs in a table."""


@dataclass(frozen=True)
class Alphabet:
    """bin = (symbol_low + symbol) · 2^low_bits + low.

    stand_in: the symbol that is coded in place of a value that is not, the most frequent one.
    """

    symbol_low: int = 0
    n_symbols: int = 1
    low_bits: int = 0
    stand_in: int = 0


@lru_cache(1 << 16)
def fixed_log2(x: int) -> int:
    """About floor(65536 · log2 x), for x >= 1: squaring doubles the logarithm, bit by bit."""
    whole = x.bit_length() - 1
    m = x >> (whole - 31) if whole >= 31 else x << (31 - whole)  # 2^31 · what is above 2^whole
    fraction = 0
    for _ in range(16):
        m = m * m >> 31
        fraction <<= 1
        if m >> 32:
            m >>= 1
            fraction |= 1
    return whole * BIT + fraction


def entropy(counts: Iterable[int]) -> int:
    """The cost of all symbols with an ideal coder for these counts."""
    present = [count for count in counts if count]
    total = sum(present)
    return total * fixed_log2(total) - sum(c * fixed_log2(c) for c in present) if total else 0


def choose_alphabet(counts: Counts, n: int, miss_bits: int) -> Alphabet:
    """The cheapest alphabet for n weights, of which a sample has these counts.

    counts: of bins -m .. m. miss_bits: what a value outside costs, its position apart.
    """
    n_counted = int(counts.sum())
    if not n_counted:
        return Alphabet()
    m = len(counts) // 2
    scale = float(n) / float(n_counted)
    best, best_cost = Alphabet(), None
    for low_bits in range(MAX_LOW_BITS + 1):
        first = -m >> low_bits
        merged = np.zeros((m >> low_bits) - first + 1, np.int64)
        np.add.at(merged, (np.arange(-m, m + 1) >> low_bits) - first, counts)
        begin, end = _window(merged.tolist(), n, scale, miss_bits)
        window = merged[begin:end].tolist()
        missed = n_counted - sum(window)
        cost = _alphabet_cost(window, missed, n, scale, miss_bits, low_bits)
        if best_cost is None or cost < best_cost:
            stand_in = window.index(max(window))
            best_cost, best = cost, Alphabet(first + begin, end - begin, low_bits, stand_in)
        if len(window) == len(merged) <= 16 and low_bits > 0:
            break  # coarser symbols have nothing left to save
    return best


def _window(merged: list[int], n: int, scale: float, miss_bits: int) -> tuple[int, int]:
    """Drop the rarer end while there are too many symbols, or while misses are cheaper."""
    begin, end = 0, len(merged)
    while end - begin > 1:
        at_begin = merged[begin] <= merged[end - 1]
        count = _of_all(merged[begin] if at_begin else merged[end - 1], scale)
        if end - begin <= MAX_SYMBOLS:
            keep = TABLE_SYMBOL_COST + count * MAX_TABLE_LOG * BIT
            if _is_rare(count, n):
                keep += _slot_cost(n)
            if keep <= count * _miss_cost(count, n, miss_bits):
                break
        if at_begin:
            begin += 1
        else:
            end -= 1
    return begin, end


def _alphabet_cost(
    window: list[int], missed: int, n: int, scale: float, miss_bits: int, low_bits: int
) -> int:
    missed_of_all = _of_all(missed, scale)
    n_rare = sum(_is_rare(_of_all(count, scale), n) for count in window)
    return (
        int(float(entropy(window)) * scale)
        + n * low_bits * BIT
        + missed_of_all * _miss_cost(missed_of_all, n, miss_bits)
        + n_rare * _slot_cost(n) // 2
        + len(window) * TABLE_SYMBOL_COST
    )


def _of_all(count: int, scale: float) -> int:
    """A sample's count, scaled up to all weights."""
    return int(float(count) * scale)


def _is_rare(count: int, n: int) -> bool:
    """Whether a symbol has more of a table than it needs, if it has one slot of 2^12."""
    return count < n >> MAX_TABLE_LOG


def _slot_cost(n: int) -> int:
    """1.44 bits · n / 4096: what leaving one slot to a rare symbol costs all others."""
    return n * 94548 // 4096


def _miss_cost(count: int, n: int, miss_bits: int) -> int:
    """Of one of `count` values in the patch: its bits, and log2(n / count) for its position."""
    return miss_bits * BIT + fixed_log2(max(1, n // max(1, count)))
