"""Intervals and tests. Written out, as each is a few lines: no statistics package is needed.

A difference between two models is always tested on the same problems, in pairs: what one problem
is worth does not add to the noise. Over a suite of comparisons the p-values are corrected (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from moebound.types import Array

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """value: the estimate. low, high: its interval at `confidence`."""

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


def wilson(successes: int, n: int, *, confidence: float = CONFIDENCE) -> Interval:
    """A share with Wilson's score interval (1927): right for small n and for shares near 0 and 1.

    NaN of everything for n = 0. Raises ValueError for counts that are none.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, found {successes} of {n}")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high, confidence)


@dataclass(frozen=True)
class Paired:
    """Two models on the same n problems. lost: right before, wrong after; gained: the reverse.
    difference: share right after minus before, with its interval. p: two-sided, exact McNemar."""

    n: int
    lost: int
    gained: int
    difference: Interval
    p: float

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "difference": self.difference.to_json()}


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare right and wrong, problem by problem. Raises ValueError for unequal lengths or none.

    The interval is Newcombe's (1998, method 10): Wilson intervals of both shares, joined with
    their correlation.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"expected pairs, found {len(before)} and {len(after)}")
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    both = sum(a and b for b, a in zip(before, after, strict=True))
    difference = _newcombe(both, lost, gained, len(before))
    return Paired(len(before), lost, gained, difference, mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p that problems change sides this unevenly by chance alone: a binomial test
    with probability 1/2 on the problems that changed. 1 where none did."""
    n, fewer = lost + gained, min(lost, gained)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n) if n < 1000 else min(1.0, math.exp(_log(2 * tail, n)))


def _log(count: int, n: int) -> float:
    """ln(count / 2^n) for integers too large for a float."""
    shift = max(0, count.bit_length() - 64)
    return math.log(count >> shift) + (shift - n) * math.log(2)


def _newcombe(both: int, lost: int, gained: int, n: int) -> Interval:
    neither = n - both - lost - gained
    one, other = wilson(both + gained, n), wilson(both + lost, n)  # after, before
    product = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    cross = both * neither - lost * gained
    # With his continuity correction.
    corrected = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    phi = corrected / math.sqrt(product) if product else 0.0
    value = one.value - other.value

    def half(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    low = value - half(one.value - one.low, other.high - other.value)
    high = value + half(one.high - one.value, other.value - other.low)
    return Interval(value, max(-1.0, low), min(1.0, high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given: calling significant
    what stays below 0.05 is wrong anywhere in the suite with probability 0.05 at most."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def sign_flip(scores: Array) -> float:
    """Exact two-sided p-value of sum(scores) when every score may as well have the other sign.

    scores: integers. The sum of differences of sizes s, signs tossed, has the characteristic
    function prod cos(s x); a Fourier transform turns it into the distribution, within 1e-13.
    """
    sizes, counts = np.unique(np.abs(scores[scores != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    step = int(np.gcd.reduce(sizes))
    sizes, observed = sizes // step, abs(int(scores.sum())) // step
    largest = int((sizes * counts).sum())
    length = 1 << (2 * largest + 1).bit_length()
    angles = 2 * np.pi * np.arange(length // 2 + 1) / length
    values = np.ones(len(angles))
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        values *= np.cos(size * angles) ** count
    chances = np.maximum(np.fft.irfft(values, length), 0.0)
    # The sum s is at index s; by symmetry -s is as likely.
    tail = chances[observed : largest + 1].sum()
    return float(min(1.0, 2 * tail if observed else 1.0))


def ratio_stderr(sums: Sequence[float], counts: Sequence[float]) -> float:
    """Standard error of sum(sums) / sum(counts), rows being the sample (linearized). NaN for
    fewer than two rows, and where a sum is infinite."""
    a, b = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if len(a) < 2 or not np.isfinite(a).all():
        return math.nan
    residuals = a - a.sum() / b.sum() * b
    return float(residuals.std(ddof=1) * math.sqrt(len(a)) / b.sum())


def quantile_of(
    values: Sequence[float] | Array, problems: Sequence[int] | Array, share: float
) -> tuple[float, float]:
    """A quantile of values that come in clusters, and its standard error: the least value that at
    least this share of them do not exceed.

    problems: of which cluster each value is; clusters are the sample. The error is Woodruff's
    (1952): that of the share of values up to the quantile, read off the values themselves. NaN for
    fewer than two clusters, and where a value in that interval is infinite. Raises ValueError
    without values.
    """
    found, of = np.asarray(values, dtype=np.float64), np.asarray(problems)
    if not len(found):
        raise ValueError("expected values, found none")
    ordered = np.sort(found)

    def at(part: float) -> float:
        # 0.99 of 100 values is 99 of them: what floating point adds is taken off.
        rank = math.ceil(part * len(ordered) - 1e-9)
        return float(ordered[min(max(rank, 1), len(ordered)) - 1])

    here = at(share)
    _, cluster = np.unique(of, return_inverse=True)
    below, counts = np.bincount(cluster, found <= here), np.bincount(cluster)
    error = ratio_stderr(below.tolist(), counts.tolist())
    if math.isnan(error):
        return here, math.nan
    spread = (at(min(1.0, share + error)) - at(max(0.0, share - error))) / 2
    return here, spread if math.isfinite(spread) else math.nan
