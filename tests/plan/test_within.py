"""Limits of measured KL: kept whatever predictions are worth, nearly used up, in a few tries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.errors import PlanError
from moebound.plan import RATES, Budget, Evidence, Measured, Plan, make_plan
from moebound.plan.within import MOST_TRIED
from moebound.score import Score

from .conftest import as_document, experts, sensitivity

SIZES = experts(4, 16)
Loses = Callable[[Plan], float]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    folder = tmp_path_factory.mktemp("within")
    return Evidence(sensitivity=as_document(sensitivity(SIZES, by_role=True), folder))


class Meter:
    """Says what a plan loses, and counts how often it was asked."""

    def __init__(self, loses: Loses) -> None:
        self.loses, self.tried = loses, list[Plan]()

    def __call__(self, plan: Plan) -> Measured:
        self.tried.append(plan)
        return Measured.of(self.loses(plan), 0.1, "t", 8)


def made(evidence: Evidence, budget: Budget, meter: Meter | None = None) -> Plan:
    return make_plan(SIZES, evidence, budget, source="tiny", measure=meter)


def predicted(plan: Plan) -> float:
    assert plan.kl is not None
    return plan.kl


@settings(max_examples=60)
@given(
    factor=st.floats(0.02, 50),
    power=st.floats(0.6, 1.5),
    jump=st.floats(0, 0.3),
    limit=st.floats(3e-4, 3e-2),
)
@pytest.mark.slow
def test_the_limit_is_kept_and_used(
    evidence: Evidence, factor: float, power: float, jump: float, limit: float
) -> None:
    """Measured KL is a power of the predicted one with jumps in it, as of routers."""

    def loses(plan: Plan) -> float:
        swing = 1 + jump * math.sin(plan.n_bytes)
        return factor * 1e-3 * math.pow(predicted(plan) / 1e-3, power) * swing

    meter = Meter(loses)
    wanted = 1e-3 * (limit / (factor * 1e-3)) ** (1 / power)  # predicted, that measures as limit
    least = predicted(made(evidence, Budget(bpw=16)))
    if not 3 * least < wanted:
        return
    plan = made(evidence, Budget(max_kl=limit), meter)
    assert plan.measured is not None
    assert plan.measured.kl == loses(plan) <= limit
    assert plan.measured.n_tried == len(meter.tried) <= MOST_TRIED
    assert plan.budget == {"max_kl": limit}
    # Not larger than what keeps the limit wherever a jump falls, but for the last step taken.
    sure = made(evidence, Budget(max_kl=wanted * (0.75 * (1 - jump) / (1 + jump)) ** (1 / power)))
    assert plan.n_bytes <= 1.02 * sure.n_bytes


@pytest.mark.parametrize("factor", [0.3, 1.7, 3, 6])
def test_a_few_tries_are_enough(evidence: Evidence, factor: float) -> None:
    """Predictions of real plans are too low by such factors, which grow with the KL."""
    meter = Meter(lambda plan: factor * 1e-3 * math.pow(predicted(plan) / 1e-3, 1.3))
    made(evidence, Budget(max_kl=2e-3), meter)
    assert len(meter.tried) <= 4


def test_a_good_prediction_is_tried_once(evidence: Evidence) -> None:
    meter = Meter(lambda plan: 0.99 * predicted(plan))
    plan = made(evidence, Budget(max_kl=1e-3), meter)
    assert len(meter.tried) == 1
    assert plan == Plan.from_json(plan.to_json())
    plain = made(evidence, Budget(max_kl=1e-3))
    assert plan.sha256 == plain.sha256
    assert plain.measured is None


def test_other_budgets_are_measured_and_no_more(evidence: Evidence) -> None:
    meter = Meter(lambda plan: 3 * predicted(plan))
    plan = made(evidence, Budget(bpw=3), meter)
    assert len(meter.tried) == 1
    assert plan.sha256 == made(evidence, Budget(bpw=3)).sha256
    assert plan.measured is not None
    assert plan.measured.kl == pytest.approx(3 * predicted(plan))
    assert predicted(plan) == predicted(made(evidence, Budget(bpw=3)))  # as it was predicted


def test_the_widest_bounds_may_be_good_enough(evidence: Evidence) -> None:
    meter = Meter(lambda plan: 1e-9)
    plan = made(evidence, Budget(max_kl=1e-2), meter)
    assert {bound.value for bound in plan.bounds} == {float(RATES[-1])}
    assert len(meter.tried) < MOST_TRIED


@pytest.mark.parametrize("lost", [0.5, math.inf])
def test_a_limit_that_nothing_keeps(evidence: Evidence, lost: float) -> None:
    meter = Meter(lambda plan: lost)
    with pytest.raises(PlanError, match=rf"--max-kl 0.01 cannot be met: .* loses {lost:g}, where"):
        made(evidence, Budget(max_kl=0.01), meter)
    assert len(meter.tried) <= MOST_TRIED


def test_a_limit_below_every_prediction(evidence: Evidence) -> None:
    with pytest.raises(PlanError, match=r"--max-kl 1e-12 cannot be met: .* predicted to lose"):
        made(evidence, Budget(max_kl=1e-12), Meter(lambda plan: 0.0))


def test_what_was_measured_comes_back_from_the_file(evidence: Evidence, tmp_path: Path) -> None:
    for kl, stderr in ((0.002, 0.0004), (math.inf, math.nan)):
        score = Score(0.01, 0.001, kl, stderr, n_problems=64, exact=False)
        found = Measured(score, "wordmath")
        plan = replace(made(evidence, Budget(bpw=3)), measured=found)
        plan.save(tmp_path / "plan.json")
        again = Plan.load(tmp_path / "plan.json").measured
        assert again is not None
        assert again.to_json() == found.to_json()
        assert (again.kl, again.n_problems, again.score.exact) == (kl, 64, False)
        assert again.score.kl_nats == 0.01
        old = {name: value for name, value in found.to_json().items() if name != "score"}
        assert Measured.from_json(old).kl == kl  # of an earlier version
    document = plan.to_json()
    del document["measured"]  # of an earlier version
    assert Plan.from_json(document).measured is None
    wrong: list[Any] = [[], {"kl": "x", "n_problems": 1}, {"kl": 0.1}]
    for bad in wrong:
        with pytest.raises(PlanError, match="measured: "):
            Plan.from_json({**document, "measured": bad})
