"""Rank correlation of predictions with measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's: Pearson's correlation of ranks, ties sharing their mean rank. None for fewer than
    two values, or where one side is constant."""
    a, b = _ranks(one), _ranks(other)
    if len(a) < 2 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    shared: npt.NDArray[np.float64] = (last - (count - 1) / 2)[place]
    return shared
