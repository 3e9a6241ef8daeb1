"""Intervals and tests against values worked out by hand or published."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.score.statistics import (
    holm,
    mcnemar,
    paired,
    ratio_stderr,
    sign_flip,
    wilson,
)


def test_wilson_is_that_of_the_literature() -> None:
    # Newcombe 1998 (two-sided methods), table I, method 3.
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:  # fmt: skip
        found = wilson(successes, n)
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 3000), st.data())
def test_wilson_holds_the_share_and_mirrors(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    found, mirrored = wilson(k, n), wilson(n - k, n)
    assert 0 <= found.low <= k / n <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)


def test_wilson_of_nothing_and_of_nonsense() -> None:
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(8, 2) == mcnemar(2, 8)
    assert mcnemar(4, 4) == 1
    # Too many for a float: the normal approximation with continuity correction is close by then.
    z = (abs(1100 - 950) - 1) / math.sqrt(2050)
    assert mcnemar(950, 1100) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.03)
    assert 0 < mcnemar(300, 1700) < 1e-200


def test_paired_counts_who_changed_sides() -> None:
    before = [True] * 45 + [False] * 5
    after = [True] * 40 + [False] * 5 + [True] + [False] * 4
    found = paired(before, after)
    assert (found.n, found.lost, found.gained) == (50, 5, 1)
    assert found.difference.value == pytest.approx(-0.08)
    assert found.difference.low < -0.08 < found.difference.high
    assert found.p == pytest.approx(2 * (1 + 6) / 64)
    same = paired(before, before)
    assert same.p == 1
    assert same.difference.low <= 0 <= same.difference.high
    with pytest.raises(ValueError, match="pairs"):
        paired([True], [])


def test_paired_interval_is_newcombes() -> None:
    # Newcombe 1998 (paired data), table II, method 10: e=36, f=12, g=2, h=0 of 50.
    found = paired([True] * 36 + [False] * 12 + [True] * 2, [True] * 48 + [False] * 2)
    assert found.difference.value == pytest.approx(0.20)
    assert found.difference.low == pytest.approx(0.0569, abs=6e-4)
    assert found.difference.high == pytest.approx(0.3404, abs=6e-4)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(lost=st.integers(0, 60), gained=st.integers(0, 60))
def test_sign_flip_of_one_seed_is_mcnemar(lost: int, gained: int) -> None:
    scores = np.array([-1] * lost + [1] * gained + [0] * 5)
    assert sign_flip(scores) == pytest.approx(mcnemar(lost, gained), abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flip_counts_every_assignment_of_signs(scores: list[int]) -> None:
    observed = abs(sum(scores))
    sums = [abs(sum(s * x for s, x in zip(signs, scores, strict=True)))
            for signs in product((-1, 1), repeat=len(scores))]  # fmt: skip
    exact = sum(total >= observed for total in sums) / len(sums)
    assert sign_flip(np.array(scores)) == pytest.approx(exact, abs=1e-12)


def test_ratio_stderr_of_equal_counts_is_that_of_a_mean() -> None:
    sums = [1.0, 2.0, 4.0, 7.0]
    expected = np.std(np.array(sums) / 2, ddof=1) / 2
    assert ratio_stderr(sums, [2.0] * 4) == pytest.approx(expected)
    assert math.isnan(ratio_stderr([1.0], [1.0]))
