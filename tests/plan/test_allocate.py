"""The allocator: inside the budget, next to the optimum, and clear about what cannot be."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.errors import PlanError
from moebound.plan.allocate import within_bytes, within_loss
from moebound.plan.items import Floats, Ints

Table = tuple[Ints, Floats]


@st.composite
def tables(draw: st.DrawFn, *, items: int = 4, columns: int = 4) -> Table:
    """Sizes fall and losses rise from left to right, as with ever wider bounds; both unevenly."""
    n = draw(st.integers(1, items))
    steps = draw(st.lists(st.integers(0, 50), min_size=n * columns, max_size=n * columns))
    sizes = np.cumsum(np.array(steps).reshape(n, columns), axis=1)[:, ::-1] + 1
    gains = draw(st.lists(st.floats(0, 10), min_size=n * columns, max_size=n * columns))
    return sizes, np.cumsum(np.array(gains).reshape(n, columns), axis=1)


def total(table: Table, choice: Ints) -> tuple[int, float]:
    rows = np.arange(len(choice))
    return int(table[0][rows, choice].sum()), float(table[1][rows, choice].sum())


@settings(max_examples=200)
@given(table=tables(), share=st.floats(0, 1))
def test_bytes_against_brute_force(table: Table, share: float) -> None:
    sizes, loss = table
    least, most = int(sizes.min(axis=1).sum()), int(sizes.max(axis=1).sum())
    budget = least + int(share * (most - least))
    spent, lost = total(table, within_bytes(sizes, loss, budget))
    assert spent <= budget
    every = [total(table, np.array(c)) for c in product(range(sizes.shape[1]), repeat=len(sizes))]
    best = min(lost for spent, lost in every if spent <= budget)
    # Off the optimum by no more than one item's largest step, as a knapsack's greedy answer is.
    assert best - 1e-9 <= lost <= best + (loss[:, -1] - loss[:, 0]).max() + 1e-9


@settings(max_examples=200)
@given(table=tables(), share=st.floats(0, 1))
def test_loss_against_brute_force(table: Table, share: float) -> None:
    sizes, loss = table
    least, most = float(loss.min(axis=1).sum()), float(loss.max(axis=1).sum())
    limit = least + share * (most - least) + 1e-9
    spent, lost = total(table, within_loss(sizes, loss, limit))
    assert lost <= limit + 1e-9
    every = [total(table, np.array(c)) for c in product(range(sizes.shape[1]), repeat=len(sizes))]
    best = min(spent for spent, lost in every if lost <= limit)
    assert best <= spent <= best + (sizes.max(axis=1) - sizes.min(axis=1)).max()


def test_many_small_steps_leave_less_than_one_of_them() -> None:
    rng = np.random.default_rng(0)
    rates = 0.01 * 2.0 ** (np.arange(25) / 3)
    sizes = np.rint(256 * np.log2(1 + rng.uniform(3, 5, (2000, 1)) / rates)).astype(np.int64)
    loss = np.exp(rng.standard_normal((2000, 1))) * rates**2
    budget = int(sizes.mean(axis=1).sum())
    spent, _ = total((sizes, loss), within_bytes(sizes, loss, budget))
    assert budget - np.abs(np.diff(sizes, axis=1)).max() < spent <= budget


def test_the_smallest_is_said() -> None:
    sizes, loss = np.array([[30, 20], [9, 5]]), np.array([[0.0, 1.0], [0.5, 2.0]])
    with pytest.raises(PlanError, match=r"budget of 24 bytes .* smallest is 25 bytes"):
        within_bytes(sizes, loss, 24)
    assert within_bytes(sizes, loss, 25).tolist() == [1, 1]
    assert within_bytes(sizes, loss, 10**9).tolist() == [0, 0]
    with pytest.raises(PlanError, match=r"KL of 0.4 .* least that a plan reaches is 0.5"):
        within_loss(sizes, loss, 0.4)
    assert within_loss(sizes, loss, 3.0).tolist() == [1, 1]


def test_no_byte_for_nothing() -> None:
    """A narrower bound that costs more and gains nothing is never taken."""
    sizes, loss = np.array([[40, 30, 20, 10]]), np.array([[0.0, 0.0, 1.0, 1.0]])
    assert within_bytes(sizes, loss, 1000).tolist() == [1]
    assert within_bytes(sizes, np.zeros((1, 4)), 1000).tolist() == [3]
