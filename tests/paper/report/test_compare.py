"""Paired tests: McNemar's for one seed, exact for more, honest where nothing differs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moebound.paper.report import student
from moebound.paper.report.compare import (
    Difference,
    Spread,
    kl_ratio,
    mean_log,
    of_scores,
    paired,
)


def test_a_difference_has_the_sign_of_what_got_worse() -> None:
    before = np.arange(200) < 150
    after = np.arange(200) < 130
    found = paired([after], [before])
    assert found.value == pytest.approx(-0.1)
    assert found.low < -0.1 < found.high < 0
    assert found.p == pytest.approx(2 * 0.5**20)


def test_seeds_average_and_add_power() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(300) < 0.9
    seeds = [before & (rng.random(300) > 0.04) for _ in range(3)]
    one, three = paired(seeds[:1], [before]), paired(seeds, [before])
    assert three.value == pytest.approx(np.mean([s.mean() for s in seeds]) - before.mean())
    assert three.p < one.p


def test_no_difference_at_all_is_no_certainty() -> None:
    right = np.ones(40, bool)
    few = paired([right], [right])
    assert few.p == 1
    assert few.low < -0.03  # 40 problems cannot exclude 3 points
    assert not few.within()
    many = np.ones(2000, bool)
    assert paired([many], [many]).within()


def test_who_solves_nothing_shows_no_robustness() -> None:
    found = Difference(0.0, -0.01, 0.01, 1.0, 500, adjusted=1.0, can_fall=0.02, can_rise=0.98)
    assert found.within()
    assert not found.unchanged
    assert found.no_gain
    full = replace(found, can_fall=0.99, can_rise=0.01)
    assert full.unchanged
    assert not full.no_gain


def test_different_lengths_compare_the_problems_that_both_have() -> None:
    assert paired([np.ones(10, bool)], [np.zeros(4, bool)]).n == 4
    assert of_scores(np.zeros(0, np.int64), 1).p == 1


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042)])
def test_student(df: int, t: float) -> None:
    assert student.quantile(df) == pytest.approx(t, abs=1e-3)
    assert student.two_sided(t, df) == pytest.approx(0.05, abs=1e-4)
    assert student.two_sided(0, df) == pytest.approx(1)


def test_kl_ratio_against_the_spread_between_seeds() -> None:
    spread = Spread.pooled([[1.0, 1.1, 0.9], [0.01, 0.0115], [7.0]])
    assert spread is not None
    assert spread.df == 3
    clear = kl_ratio([2.0, 2.1], [1.0, 1.05], spread)
    assert clear is not None
    assert clear.low > 0
    unclear = kl_ratio([1.03], [1.0], spread)
    assert unclear is not None
    assert unclear.low < 0 < unclear.high
    assert kl_ratio([0.0], [1.0], spread) is None
    assert kl_ratio([1.0], [1.0], Spread.pooled([[1.0]])) is None


def test_mean_log_needs_three() -> None:
    assert mean_log([2.0, 2.0]) is None
    found = mean_log([1.9, 2.0, 2.1, 2.0])
    assert found is not None
    assert np.exp(found.value) == pytest.approx(2.0, rel=0.01)
    same = mean_log([2.0, 2.0, 2.0])
    assert same is not None
    assert same.low == same.high
