"""The smallest plan that keeps a limit of KL when it is measured, not only when it is predicted.

Plans are ordered by the KL that was predicted for them. Which prediction measures as the limit is
found by trying: first nearly in proportion, since the two differ by a factor that changes slowly;
then between the nearest plan that keeps the limit and the nearest that does not, by the Illinois
method on logarithms (regula falsi, where an end that stays counts for half). Measured KL jumps
where routers change their minds, so this finds a plan that keeps the limit, and nearly uses it up;
it never takes one that was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moebound.errors import PlanError
from moebound.plan.measured import Measured
from moebound.plan.plan import Plan

Measure = Callable[[Plan], Measured]
"""What a plan loses. The same for the same plan."""

MOST_TRIED = 8
CLOSE = 0.8
"""Of the limit: a plan that measures so much of it is near enough. No trial is more exact."""
SAME_SIZE = 0.99
"""Two plans, one of which keeps the limit, are near enough if their sizes differ by less."""
_AIM = 0.9
_PROPORTION = 0.8
"""Power of the first step. Measured KL grows faster than predicted KL where bounds are wide."""
_MOST = 16.0
"""A step, where only one end is known."""


@dataclass(frozen=True)
class _Tried:
    """asked: the prediction that the plan was made for. weight: of an end between two, 1 at first;
    it falls while only the other end moves."""

    asked: float
    plan: Plan
    measured: Measured
    weight: float = 1.0

    def off(self, aim: float) -> float:
        """How far it is from the aim, in logarithms; a KL of nothing or of infinity is far."""
        kl = self.measured.kl
        return self.weight * math.log(min(max(kl / aim, 1 / _MOST), _MOST))


def within_measured(make: Callable[[float], Plan], measure: Measure, max_kl: float) -> Plan:
    """The smallest of the plans tried whose measured KL is at most max_kl, with that measurement.

    make: the smallest plan whose predicted KL is at most so much; PlanError if there is none.
    measure: is called MOST_TRIED times at most. Raises PlanError, with what came nearest, if no
    plan tried keeps the limit.
    """
    keeps: _Tried | None = None
    breaks: _Tried | None = None
    latest: _Tried | None = None
    too_low = 0.0  # no plan is predicted to lose as little
    known = set[str]()
    asked, n_tried = max_kl, 0
    while n_tried < MOST_TRIED:
        try:
            plan = make(asked)
        except PlanError:
            if breaks is None:
                raise
            if asked > 0.9 * breaks.asked:
                break
            too_low = asked
            asked = math.sqrt(asked * breaks.asked)
            continue
        if plan.sha256 in known:
            break
        n_tried += 1
        now = _Tried(asked, plan, measure(plan))
        known.add(plan.sha256)
        if now.measured.kl <= max_kl:
            breaks = _staying(breaks) if keeps is latest else breaks
            latest = keeps = now
        else:
            keeps = _staying(keeps) if breaks is latest else keeps
            latest = breaks = now
        if keeps is not None and _near(keeps, breaks, max_kl):
            break
        asked = _next(keeps, breaks, too_low, max_kl)
    if keeps is None:
        assert breaks is not None
        raise PlanError(
            f"--max-kl {max_kl:g} cannot be met: of {n_tried} plans measured, the narrowest loses "
            f"{breaks.measured.kl:.3g}, where {breaks.asked:.3g} was predicted"
        )
    return replace(keeps.plan, measured=keeps.measured.after(n_tried))


def _staying(end: _Tried | None) -> _Tried | None:
    return None if end is None else replace(end, weight=end.weight / 2)


def _near(keeps: _Tried, breaks: _Tried | None, max_kl: float) -> bool:
    if keeps.measured.kl >= CLOSE * max_kl:
        return True
    return breaks is not None and breaks.plan.n_bytes >= SAME_SIZE * keeps.plan.n_bytes


def _next(keeps: _Tried | None, breaks: _Tried | None, too_low: float, max_kl: float) -> float:
    """The prediction to try."""
    aim = _AIM * max_kl
    if keeps is None or breaks is None:
        only = keeps or breaks
        assert only is not None
        asked = only.asked * math.exp(-_PROPORTION * only.off(aim))
        return asked if asked > too_low else math.sqrt(too_low * only.asked)
    low, high = keeps.off(aim), breaks.off(aim)
    # Below 0, since what measures CLOSE to the limit was taken; and above 0. Then well inside.
    share = min(max(-low / (high - low), 0.1), 0.9)
    return math.exp((1 - share) * math.log(keeps.asked) + share * math.log(breaks.asked))
