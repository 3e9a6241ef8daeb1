"""The assignment of rows to columns with the least sum of costs.

Jonker and Volgenant's shortest augmenting paths (Computing 38, 1987), a row of NumPy at a time.
With nothing but sums, differences and minima of float64 it gives the same assignment on every
machine, ties included.
"""

from __future__ import annotations

import numpy as np

from moebound.types import Array


def assign(cost: Array) -> Array:
    """[n] the column of each row. cost: [n, n] float64, finite."""
    n = len(cost)
    price, row_of = cost.min(axis=0), np.full(n, -1)
    col_of = np.full(n, -1)
    # A column goes to the row that made its price, unless that row has one already.
    for col, row in enumerate(cost.argmin(axis=0)):
        if col_of[row] < 0:
            col_of[row], row_of[col] = col, row
    for _ in range(2):
        _reduce(cost, price, row_of, col_of)
    for row in np.flatnonzero(col_of < 0):
        _augment(cost, price, row_of, col_of, int(row))
    return col_of


def _reduce(cost: Array, price: Array, row_of: Array, col_of: Array) -> None:
    """Free rows bid for their best columns; whoever is outbid bids in turn."""
    for row in np.flatnonzero(col_of < 0):
        at = int(row)
        for _ in range(len(cost)):
            reduced = cost[at] - price
            best = int(reduced.argmin())
            least = reduced[best]
            reduced[best] = np.inf
            second = int(reduced.argmin())
            gap = reduced[second] - least
            if gap > 0:
                price[best] -= gap
            elif row_of[best] >= 0:
                best = second
            loser = int(row_of[best])
            row_of[best], col_of[at] = at, best
            if loser < 0:
                break
            col_of[loser] = -1
            if not gap > 0:
                break
            at = loser


def _augment(cost: Array, price: Array, row_of: Array, col_of: Array, start: int) -> None:
    """The shortest path from a free row to a free column, and every step of it turned round."""
    n = len(cost)
    distance = cost[start] - price
    before, done = np.full(n, start), np.zeros(n, bool)
    ready: list[int] = []
    while True:
        col = int(np.where(done, np.inf, distance).argmin())
        shortest = distance[col]
        if row_of[col] < 0:
            break
        done[col] = True
        ready.append(col)
        row = int(row_of[col])
        through = cost[row] - price
        through += shortest - through[col]
        nearer = (through < distance) & ~done
        distance[nearer], before[nearer] = through[nearer], row
    price[ready] += distance[ready] - shortest
    while True:
        row = int(before[col])
        row_of[col] = row
        col_of[row], col = col, int(col_of[row])
        if row == start:
            return
