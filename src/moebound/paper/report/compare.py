"""How sure a difference is: paired over problems for accuracies, over noise seeds for KL.

Accuracies. Every condition answers the same problems, so a difference is tested problem by problem.
With one noise seed on either side this is McNemar's exact test. With more, a problem's score is the
share of seeds that get it right, and the test is the exact sign-flip test of the differences: every
difference is as likely to have the other sign if the conditions are alike. With one seed the two
are the same. The interval adds half a problem to each cell of the paired table (Agresti and Min
2005), which keeps it honest where almost nothing differs. What is tested is these draws of noise.

KL. There are few seeds, so the spread between them (of log KL) is pooled over the conditions of a
table, and a ratio gets Student's interval with the degrees of freedom of that pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebound.paper.report import student
from moebound.score.statistics import mcnemar, sign_flip
from moebound.types import Array

LEVEL = 0.95
ALPHA = 0.05
MARGIN = 0.03
"""Three points of accuracy: an interval inside of plus and minus this is called "no change"."""
SEVERE = 0.10
"""A drop by more is called severe."""
NEAR = 1.25
"""A simulation predicts if its mean effect (KL) is within this factor of the codec's."""
FLOOR = 0.1
"""Below this share of right answers a task is too hard for the model to show a loss."""
_Z = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """A minus B (accuracies), or log(A / B) (KL), with a 95 % interval.

    p: of "no difference", before a correction; adjusted: after Holm's, over all that the report
    compares. n: problems, or values of KL. can_fall, can_rise: how far B is from none and from all
    right: a model that solves nothing has nothing to lose, and shows no robustness by it.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    adjusted: float = math.nan
    can_fall: float = 1.0
    can_rise: float = 1.0

    @property
    def lower(self) -> bool:
        """A is below B, beyond chance."""
        return self.adjusted < ALPHA and self.value < 0

    @property
    def higher(self) -> bool:
        return self.adjusted < ALPHA and self.value > 0

    def within(self, margin: float = MARGIN) -> bool:
        """Whatever the difference is, it is smaller than this."""
        return -margin < self.low and self.high < margin

    @property
    def unchanged(self) -> bool:
        """Within the margin, where there was something to lose."""
        return self.within() and self.can_fall >= FLOOR

    @property
    def no_gain(self) -> bool:
        """A gain of the margin is excluded, where there was room for one."""
        return self.high < MARGIN <= self.can_rise

    @property
    def drops(self) -> bool:
        """Lower beyond chance, and by more than a margin that matters."""
        return self.lower and self.value <= -MARGIN

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def paired(a: Sequence[Array], b: Sequence[Array]) -> Difference:
    """Accuracy of A minus that of B. a, b: for each seed bool [n]; problems that both have count.

    Raises ValueError if either has no seed.
    """
    n = min(len(right) for right in (*a, *b))
    left, right = _scores(a, n), _scores(b, n)
    return of_scores(left * len(b) - right * len(a), len(a) * len(b))


def of_scores(scores: Array, unit: int) -> Difference:
    """The mean of per-problem differences. scores: integers [n], in units of 1 / unit."""
    n = len(scores)
    if not n:
        return Difference(0.0, -1.0, 1.0, 1.0, 0)
    d = scores / unit
    # Half a problem in each of the four cells: two more problems, of which one differs.
    mean = float(d.sum()) / (n + 2)
    spread = math.sqrt(max(float((d * d).sum()) + 1, 0.0) / (n + 2) - mean * mean)
    half = _Z * spread / math.sqrt(n + 2)
    if unit == 1 and np.abs(scores).max() <= 1:
        p = mcnemar(int((scores > 0).sum()), int((scores < 0).sum()))
    else:
        p = sign_flip(scores)
    low, high = max(mean - half, -2.0), min(mean + half, 2.0)
    return Difference(float(d.mean()), low, high, p, n)


def _scores(seeds: Sequence[Array], n: int) -> Array:
    """[n], for how many seeds each problem is right."""
    if not seeds:
        raise ValueError("no seed to compare")
    return np.asarray(np.sum([right[:n] for right in seeds], axis=0, dtype=np.int64))


@dataclass(frozen=True)
class Spread:
    """How much log KL varies from seed to seed. sd: pooled; df: the pool's degrees of freedom."""

    sd: float
    df: int

    @classmethod
    def pooled(cls, groups: Sequence[Sequence[float]]) -> Spread | None:
        """groups: KL values above 0 of one condition each. None if no group has two."""
        squares, df = 0.0, 0
        for group in groups:
            if len(group) > 1:
                logs = np.log(group)
                squares += float(((logs - logs.mean()) ** 2).sum())
                df += len(group) - 1
        return cls(math.sqrt(squares / df), df) if df else None


def kl_ratio(a: Sequence[float], b: Sequence[float], spread: Spread | None) -> Difference | None:
    """log(KL of A / KL of B), of means of logs. None where a KL is 0 or the spread is unknown."""
    if spread is None or not a or not b or min(*a, *b) <= 0:
        return None
    value = float(np.log(a).mean() - np.log(b).mean())
    error = spread.sd * math.sqrt(1 / len(a) + 1 / len(b))
    return by_student(value, error, spread.df, len(a) + len(b))


def mean_log(ratios: Sequence[float]) -> Difference | None:
    """The mean of log ratios, one a condition, the conditions a sample. None for fewer than 3."""
    if len(ratios) < 3 or min(ratios) <= 0:
        return None
    logs = np.log(ratios)
    error = float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return by_student(float(logs.mean()), error, len(logs) - 1, len(logs))


def by_student(value: float, error: float, df: int, n: int) -> Difference:
    """A mean of logs with its standard error: Student's interval and test."""
    if error == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, n)
    half = student.quantile(df, LEVEL) * error
    return Difference(value, value - half, value + half, student.two_sided(value / error, df), n)
