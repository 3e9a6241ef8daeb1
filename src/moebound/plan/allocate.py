"""Spend a budget where it buys most: the smallest loss in so many bytes, or the other way round.

Each item offers sizes and losses. On the lower convex hull of those points a Lagrangian solution is
a prefix of all steps of all items, ordered by how much loss a byte takes away (Shoham and Gersho,
1988; the classic of rate allocation). Among the hulls' corners it is optimal but for the last step.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from moebound.errors import PlanError
from moebound.plan.items import Floats, Ints


def within_bytes(sizes: Ints, loss: Floats, budget_bytes: int) -> Ints:
    """[N] the column that each item takes: the least total loss whose sizes stay in the budget.

    sizes, loss: [N, R]. Never over the budget; what is left of it is less than any step that is
    still open costs. Raises PlanError, with the smallest size there is, if even that is over.
    """
    choice, item, column, more_bytes, _ = _steps(sizes, loss)
    smallest = int(sizes[np.arange(len(sizes)), choice].sum())
    if smallest > budget_bytes:
        raise PlanError(
            f"a budget of {budget_bytes} bytes cannot be met: the smallest is {smallest} bytes"
        )
    spent = smallest + np.cumsum(more_bytes)
    n_taken = int(np.searchsorted(spent, budget_bytes, side="right"))
    left = budget_bytes - (int(spent[n_taken - 1]) if n_taken else smallest)
    choice[item[:n_taken]] = column[:n_taken]
    # Steps further down may still fit into what the first one that did not has left.
    closed = set[int]()
    rest = zip(
        item[n_taken:].tolist(),
        column[n_taken:].tolist(),
        more_bytes[n_taken:].tolist(),
        strict=True,
    )
    for i, c, cost in rest:
        if i in closed:
            continue
        if cost > left:
            closed.add(i)
            continue
        choice[i], left = c, left - cost
    return choice


def within_loss(sizes: Ints, loss: Floats, max_loss: float) -> Ints:
    """[N] the column that each item takes: the smallest total size whose loss is at most max_loss.

    Raises PlanError, with the least loss there is, if even that is more.
    """
    choice, item, column, _, less_loss = _steps(sizes, loss)
    total = float(loss[np.arange(len(loss)), choice].sum())
    lost = total - np.concatenate([[0.0], np.cumsum(less_loss)])
    enough = np.flatnonzero(lost <= max_loss)
    if not len(enough):
        raise PlanError(
            f"a KL of {max_loss:g} cannot be met: the least that a plan reaches is {lost[-1]:g}"
        )
    n_taken = int(enough[0])
    choice[item[:n_taken]] = column[:n_taken]
    return choice


def _steps(sizes: Ints, loss: Floats) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """Everyone's smallest size, and all steps up the hulls, best first.

    Returns [N] the columns to begin with, and of each step its item, the column it leads to, the
    bytes it costs and the loss it takes away.
    """
    start = np.zeros(len(sizes), np.int64)
    found: list[tuple[float, int, int, int, float]] = []
    for i, (size, lost) in enumerate(zip(sizes.tolist(), loss.tolist(), strict=True)):
        corners = _hull(size, lost)
        start[i] = corners[0]
        for a, b in pairwise(corners):
            cost, gain = size[b] - size[a], lost[a] - lost[b]
            found.append((-gain / cost, i, b, cost, gain))
    found.sort(key=lambda step: step[0])  # stable: an item's own steps stay in order
    if not found:
        nothing = np.zeros(0, np.int64)
        return start, nothing, nothing, nothing, np.zeros(0)
    _, item, column, cost_, gain_ = zip(*found, strict=True)
    return start, np.array(item), np.array(column), np.array(cost_), np.array(gain_, np.float64)


def _hull(size: list[int], loss: list[float]) -> list[int]:
    """Columns on the lower convex hull, from the smallest size to the least loss."""
    hull: list[int] = []
    for c in sorted(range(len(size)), key=lambda c: (size[c], loss[c])):
        if hull and loss[c] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (size[c] - size[a]) > (loss[a] - loss[c]) * (
                size[b] - size[a]
            ):
                break
            hull.pop()
        hull.append(c)
    return hull
