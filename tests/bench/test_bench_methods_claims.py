"""Verdicts on claims: in pairs, with intervals, corrected for their number."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moebound.bench.methods.claims import CLAIMS, Claim, difference, judge
from moebound.bench.methods.comparison import METHODS
from moebound.bench.methods.making import Made
from moebound.bench.methods.page import render
from moebound.bench.methods.planned import FISHER
from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.evaluate.evaluation import Evaluation, Scored
from moebound.score import Score

CLAIM = Claim("a paper", "better than b", "a", "b")
N = 40


def evaluation() -> Evaluation:
    rows = (Scored(str(i), "plain", True, True, True, True, 3, "1") for i in range(N))
    return Evaluation({}, "task", tuple(rows))


def row(method: str, sums: list[float], bits: float = 4.0) -> MethodRow:
    made = Made(method, None, 8, 16, 8, 16, "none", 0.1, 0.1, 1.0, 1.0, 2, 1)
    score = Score(kl_nats=max(0.0, sum(sums) / (10 * N)), kl_stderr=0.01)
    return MethodRow(
        method, bits, None, made, score, evaluation(), tuple((value, value) for value in sums)
    )


def report(*rows: MethodRow) -> MethodsReport:
    return MethodsReport("model", "task", N, evaluation(), ((10, 2),) * N, rows, {})


def noisy(mean: float, swing: float) -> list[float]:
    return [mean + swing * (1 if i % 2 else -1) for i in range(N)]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        (noisy(1, 0.1), noisy(2, 0.2), "holds"),
        (noisy(2, 0.2), noisy(1, 0.1), "does not hold"),
        (noisy(1, 0.9), noisy(1.01, 0.1), "cannot be told"),
        (noisy(1, 0.1), noisy(1, 0.1), "cannot be told"),
        (noisy(1, 0.1), [math.inf] * N, "holds"),
        ([math.inf] * N, [math.inf] * N, "cannot be told"),
    ],
)
def test_a_verdict_is_what_pairs_of_problems_say(
    better: list[float], worse: list[float], verdict: str
) -> None:
    (judged,) = judge(report(row("a", better), row("b", worse)), [CLAIM])
    assert judged.verdict == verdict


def test_what_all_problems_have_in_common_does_not_hide_a_difference() -> None:
    hard = [1.0 + 10 * (i % 7) for i in range(N)]
    a, b = row("a", hard), row("b", [value + 0.01 * (1 + i % 2) for i, value in enumerate(hard)])
    interval, p = difference(report(a, b), a, b)
    assert interval.value == pytest.approx(0.0015)
    assert 0 < interval.low < interval.value < interval.high
    assert p < 1e-6


def test_sizes_that_disagree_are_said_and_sizes_of_one_alone_do_not_count() -> None:
    low, high = noisy(1, 0.1), noisy(2, 0.1)
    rows = [row("a", low), row("b", high), row("a", high, 2.0), row("b", low, 2.0)]
    (judged,) = judge(report(*rows, row("a", low, 8.0)), [CLAIM])
    assert judged.verdict == "depends on the size"
    assert [(one.bits, one.holds) for one in judged.found] == [(4.0, True), (2.0, False)]
    (judged,) = judge(report(row("a", low)), [CLAIM])
    assert judged.verdict == "not measured"


def test_many_comparisons_make_chance_less_convincing() -> None:
    a, b = (
        noisy(1, 0.3),
        [value + (0.25 if i % 4 == 0 else 0) for i, value in enumerate(noisy(1, 0.3))],
    )
    alone = judge(report(row("a", a), row("b", b)), [CLAIM])
    many = judge(report(row("a", a), row("b", b)), [CLAIM] * 50)
    assert many[0].found[0].p == pytest.approx(min(1.0, 50 * alone[0].found[0].p))


def test_claims_name_methods_that_are_measured() -> None:
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= {FISHER, *METHODS}, claim


def test_a_broken_promise_is_the_first_thing_on_the_page() -> None:
    broken = MethodRow("c", 4.0, reason="a store breaks its promise: w < 3 & so on", violated=True)
    page = render(report(row("a", noisy(1, 0.1)), broken))
    assert "break their promise" in page
    assert "w &lt; 3 &amp; so on" in page


def test_a_row_comes_back_as_it_was_kept() -> None:
    before = row("a", [*noisy(1, 0.1)[1:], math.inf])
    assert MethodRow.of_kept(_json(before.to_kept()), "task") == before
    missed = MethodRow("a", 2.0, 60.0, reason="too small", nearest=2.5)
    assert MethodRow.of_kept(_json(missed.to_kept()), "task") == missed


def _json(data: Any) -> Any:
    import json

    return json.loads(json.dumps(data, allow_nan=False))
