"""Table 2's measures: the formulas as written, their extremes, and what they do not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.errors import MoeboundError
from moebound.profile.balance import Balance, balance, by_chance

counts = st.lists(st.integers(0, 10_000), min_size=1, max_size=40).filter(any)


def as_defined(c: list[int]) -> Balance:
    """The formulas of the module's docstring, word for word."""
    n, total = len(c), sum(c)
    mean = total / n
    return Balance(
        imbalance=math.sqrt(sum((x - mean) ** 2 for x in c) / n) / mean,
        utilisation=sum(x > 0 for x in c) / n,
        entropy=1.0 if n == 1 else
        -sum(x / total * math.log(x / total) for x in c if x) / math.log(n),
        gini=sum(abs(x - y) for x in c for y in c) / (2 * n * n * mean),
        peak_load=max(c) / mean,
    )  # fmt: skip


def close(a: Balance, b: Balance) -> None:
    assert a.to_json() == pytest.approx(b.to_json(), abs=1e-9)


@given(counts)
def test_formulas(c: list[int]) -> None:
    close(balance(c), as_defined(c))


@given(counts)
def test_ranges(c: list[int]) -> None:
    found = balance(c)
    assert found.imbalance >= 0
    assert 0 < found.utilisation <= 1
    assert 0 <= found.entropy <= 1 + 1e-12
    assert -1e-12 <= found.gini < 1
    assert found.peak_load >= 1 - 1e-12


@given(counts, st.integers(2, 9), st.randoms())
def test_neither_order_nor_scale_matters(c: list[int], factor: int, random: object) -> None:
    shuffled = c.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    close(balance(c), balance(shuffled))
    close(balance(c), balance([factor * x for x in c]))


@pytest.mark.parametrize("n", [1, 2, 64])
def test_even_use(n: int) -> None:
    close(balance([7] * n), Balance(0, 1, 1, 0, 1))


@pytest.mark.parametrize(("n", "k"), [(64, 6), (8, 2), (4, 1)])
def test_always_the_same_experts(n: int, k: int) -> None:
    """The extremes that the docstring states."""
    close(
        balance([100] * k + [0] * (n - k)),
        Balance(math.sqrt(n / k - 1), k / n, math.log(k) / math.log(n), 1 - k / n, n / k),
    )


@given(st.lists(st.integers(0, 10_000), max_size=30), st.integers(0, 9_000), st.integers(2, 900))
def test_taking_from_the_rich_is_more_even(others: list[int], poor: int, gap: int) -> None:
    before = balance([*others, poor + gap, poor])
    after = balance([*others, poor + gap - 1, poor + 1])
    assert after.imbalance < before.imbalance
    assert after.gini < before.gini
    assert after.entropy > before.entropy - 1e-12


@pytest.mark.parametrize("bad", [[], [0, 0], [-1, 2], [math.nan, 1.0], [math.inf, 1.0]])
def test_what_has_no_balance(bad: list[float]) -> None:
    with pytest.raises(MoeboundError):
        balance(bad)  # type: ignore[arg-type]


def test_by_chance_is_what_even_drawing_gives() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        chosen = rng.random((500, 64)).argpartition(6, axis=1)[:, :6]
        found.append(balance(np.bincount(chosen.reshape(-1), minlength=64)).imbalance)
    assert float(np.mean(found)) == pytest.approx(by_chance(64, 6, 500), rel=0.05)
    assert by_chance(64, 6, 0) == math.inf
