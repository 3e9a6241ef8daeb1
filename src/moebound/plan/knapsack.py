"""One choice for each unit, of least total loss in so many bytes: exactly, by dynamic programming.

The multiple-choice knapsack that PMQ and MxMoE give to an integer-program solver. Bytes above every
unit's smallest are counted in their greatest common divisor, so that nothing is rounded where units
are of one shape; where that would be more than 20,000 steps, in larger ones, each unit's rounded
up. The budget is kept either way.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from moebound.errors import PlanError
from moebound.plan.items import Floats, Ints

_STEPS = 20_000


def knapsack(
    sizes: Ints, loss: Floats, budget_bytes: int, *, required: Collection[int] = ()
) -> Ints:
    """[N] the column that each unit takes.

    sizes, loss: [N, W]. required: columns that at least one unit takes each. Of equal losses the
    one found first is taken. Raises PlanError, with the smallest size there is, where nothing fits.
    """
    marks = {column: 1 << at for at, column in enumerate(sorted(required))}
    n, n_masks, least = len(sizes), 1 << len(marks), sizes.min(axis=1)
    room = budget_bytes - int(least.sum())
    if room < 0:
        raise PlanError(
            f"a budget of {budget_bytes} bytes cannot be met: the smallest is {least.sum()} bytes"
        )
    more = sizes - least[:, None]
    step = int(np.gcd.reduce(more, axis=None)) or 1
    room = min(room, int(more.max(axis=1).sum()))
    step = step if room // step <= _STEPS else -(-room // _STEPS)
    more = -(-more // step)
    last = room // step
    best = np.full((n_masks, last + 1), np.inf)
    best[0] = 0.0
    chosen = np.zeros((n, *best.shape), np.uint8)
    before = np.zeros((n, *best.shape), np.uint8)
    for unit in range(n):
        found = np.full_like(best, np.inf)
        for column in range(sizes.shape[1]):
            cost = int(more[unit, column])
            if cost > last:
                continue
            for mask in range(n_masks):
                to = mask | marks.get(column, 0)
                offered = best[mask, : last + 1 - cost] + loss[unit, column]
                less = np.flatnonzero(offered < found[to, cost:])
                found[to, less + cost] = offered[less]
                chosen[unit, to, less + cost] = column
                before[unit, to, less + cost] = mask
        best = found
    if not np.isfinite(best[-1, -1]):
        raise PlanError(
            f"a budget of {budget_bytes} bytes has no room for one unit at each width that is asked"
        )
    choice, mask, at = np.zeros(n, np.int64), n_masks - 1, last
    for unit in range(n - 1, -1, -1):
        choice[unit] = chosen[unit, mask, at]
        mask, at = int(before[unit, mask, at]), at - int(more[unit, choice[unit]])
    return choice
