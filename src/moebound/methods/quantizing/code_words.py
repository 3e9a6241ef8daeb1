"""QMoE's code words (2310.16795, section 4): ternary weights in 16 bits for a run of up to 28.

Weights are one of three symbols: 0 for zero, 1 for a row's least weight, 2 for its largest. Two
neighbours are a pair, `first + 3 · second`. The dictionary is the 2^16 most likely runs of 1 to 14
pairs where a weight is zero with probability 0.885, and each of the others with half of the rest
(algorithm 1): no matter what a matrix holds, so it is stored nowhere. Likelier runs come first, of
equally likely ones those whose pairs are first in the order of words in a dictionary.

Every beginning of a run is likelier than the run, so it is there, too; and so are all single
pairs. A row is cut up greedily, into the longest run that is there, which takes the fewest code
words. Each row begins with a code word of its own; the last pair of an odd row ends with a zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb

import numpy as np
import numpy.typing as npt

from moebound.errors import CorruptionError
from moebound.types import Array

N_WORDS = 1 << 16
MOST_PAIRS = 14
MOST_WEIGHTS = 2 * MOST_PAIRS
"""Of a code word."""
ZEROS = Fraction(885, 1000)
"""How likely a zero is, for which the dictionary is made."""
_PAIRS = 9
_ROOT = N_WORDS
_PIECE = 1 << 20
"""Weights that are decoded at a time."""

Symbols = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """By code word. symbols: [2^16, 28], of its run, zeros behind it. lengths: [2^16] weights in
    it. longer: [2^16 + 1, 9], the code word of a run with one more pair, -1 where there is none;
    the last row begins a run."""

    symbols: Symbols
    lengths: npt.NDArray[np.uint8]
    longer: npt.NDArray[np.int32]


@lru_cache(maxsize=1)
def dictionary() -> Dictionary:
    """The one that there is. It takes a tenth of a second, once."""
    ranks = _ranks()
    # Runs by the number of their pairs. Each is told by where its beginning is in the one before.
    runs = [np.zeros((1, MOST_PAIRS), np.uint8)]
    others, parents, places = [np.zeros(1, np.intp)], [np.zeros(1, np.intp)], [0]
    of_pair = np.array([(pair % 3 > 0) + (pair > 2) for pair in range(_PAIRS)])
    for length in range(1, MOST_PAIRS + 1):
        rank = ranks[length][others[-1][:, None] + of_pair]
        parent, pair = np.nonzero(rank >= 0)
        run = runs[-1][parent]
        run[:, length - 1] = pair
        places.append(places[-1] + len(runs[-1]))
        parents.append(parent + places[-2])
        others.append(others[-1][parent] + of_pair[pair])
        runs.append(run)
    n_pairs = np.repeat(np.arange(MOST_PAIRS + 1), [len(run) for run in runs])[1:]
    run, parent = np.concatenate(runs)[1:], np.concatenate(parents)[1:]
    rank = ranks[n_pairs, np.concatenate(others)[1:]]
    # lexsort: the last key counts first.
    order = np.lexsort((*run.T[::-1], rank))[:N_WORDS]
    word = np.full(len(run) + 1, -1, np.int32)  # of a run; the first is none
    word[order + 1] = np.arange(N_WORDS)
    word[0] = _ROOT
    run, n_pairs, begins = run[order], n_pairs[order], word[parent[order]]
    longer = np.full((N_WORDS + 1, _PAIRS), -1, np.int32)
    longer[begins, run[np.arange(N_WORDS), n_pairs - 1]] = np.arange(N_WORDS)
    symbols = np.stack([run % 3, run // 3], axis=2).reshape(N_WORDS, MOST_WEIGHTS)
    return Dictionary(symbols, (2 * n_pairs).astype(np.uint8), longer)


def _ranks() -> npt.NDArray[np.int64]:
    """[pairs, weights that are not zero]: of such runs, how many kinds are likelier; -1 for those
    that are too many. The last kind that is there may be there in part."""
    other = (1 - ZEROS) / 2
    kinds = [
        (ZEROS ** (2 * pairs - others) * other**others, pairs, others)
        for pairs in range(1, MOST_PAIRS + 1)
        for others in range(2 * pairs + 1)
    ]
    found, left = np.full((MOST_PAIRS + 1, MOST_WEIGHTS + 3), -1, np.int64), N_WORDS
    for rank, (_, pairs, others) in enumerate(sorted(kinds, reverse=True)):
        found[pairs, others] = rank
        left -= comb(2 * pairs, others) << others
        if left <= 0:
            break
    return found


def encode(symbols: Symbols) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """Code words of [rows, cols], and where each row begins among them, with the end: [rows + 1].

    All rows go on side by side, one pair at a time.
    """
    longer, (rows, cols) = dictionary().longer, symbols.shape
    columns = np.zeros((cols + cols % 2, rows), np.uint8)
    columns[:cols] = symbols.T
    pairs = columns[0::2] + 3 * columns[1::2]
    words = np.empty(pairs.shape, np.uint16)
    ends = np.ones(pairs.shape, bool)
    flat = longer.reshape(-1)
    node = np.full(rows, _ROOT, np.int32)
    for at, pair in enumerate(pairs):
        found = flat[node * _PAIRS + pair]
        if at:
            ends[at - 1] = found < 0
            words[at - 1] = node
        node = np.where(found < 0, longer[_ROOT, pair], found)
    words[-1:] = node
    begins = np.concatenate([[0], ends.sum(axis=0, dtype=np.int64).cumsum()])
    return words.T[ends.T], begins


def decode(
    words: npt.NDArray[np.uint16], begins: npt.NDArray[np.int64], cols: int
) -> Iterator[tuple[slice, Symbols]]:
    """[some rows, cols] of symbols, some rows at a time, with which they are.

    Raises CorruptionError, before any symbol is written, unless every row's runs have as many
    weights as it has, and for an odd row that does not end with a zero.
    """
    known, rows = dictionary(), len(begins) - 1
    if begins[0] or begins[-1] != len(words) or (np.diff(begins) < 0).any():
        raise CorruptionError(f"rows begin elsewhere than among {len(words)} code words")
    lengths = known.lengths[words]
    reached = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
    wide = cols + cols % 2
    wrong = np.flatnonzero(np.diff(reached[begins]) != wide)
    if wrong.size:
        row = int(wrong[0])
        found = int(reached[begins[row + 1]] - reached[begins[row]])
        raise CorruptionError(f"row {row}: code words of {found} weights, expected {wide}")
    place = np.arange(MOST_WEIGHTS, dtype=np.uint8)
    step = max(1, _PIECE // max(1, wide))
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        own = slice(begins[some.start], begins[some.stop])
        runs = known.symbols[words[own]][place < lengths[own, None]]
        own_rows = runs.reshape(-1, wide)
        if wide > cols and own_rows[:, cols:].any():
            raise CorruptionError("a row of an odd number of weights goes on behind its end")
        yield some, own_rows[:, :cols]


def entropy(shares: Array) -> float:
    """Bits a symbol, of how often each is there."""
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())
