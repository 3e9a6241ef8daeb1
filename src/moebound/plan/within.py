"""The smallest plan that keeps a limit of KL when it is measured, not only when it is predicted.

Plans are ordered by the KL that was predicted for them. Which prediction measures as the limit is
found by trying: in proportion first, since the two differ by a factor that changes slowly, then
between the nearest plan that keeps the limit and the nearest that does not. Measured KL jumps a
little where a router changes its mind, so this finds a plan that keeps the limit, and close to the
largest; it never takes one that was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from moebound.errors import PlanError
from moebound.plan.measured import Measure, Measured
from moebound.plan.plan import Plan

MOST_TRIED = 8
CLOSE = 0.9
"""Of the limit: a plan that measures so much of it is near enough."""
SAME_SIZE = 0.997
"""Two plans, one of which keeps the limit, are near enough if their sizes differ by less."""
_AIM = 0.96
_LEAST, _MOST = 1 / 16, 16.0


@dataclass(frozen=True)
class _Tried:
    """asked: the prediction that the plan was made for."""

    asked: float
    plan: Plan
    measured: Measured


def within_measured(make: Callable[[float], Plan], measure: Measure, max_kl: float) -> Plan:
    """The smallest of the plans tried whose measured KL is at most max_kl, with that measurement.

    make: the smallest plan whose predicted KL is at most so much; PlanError if there is none.
    measure: is called MOST_TRIED times at most. Raises PlanError, with what came nearest, if no
    plan tried keeps the limit.
    """
    keeps: _Tried | None = None
    breaks: _Tried | None = None
    too_low = 0.0  # no plan is predicted to lose as little
    known: dict[str, Measured] = {}
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
        known[plan.sha256] = now.measured
        if now.measured.kl <= max_kl:
            keeps = now
        else:
            breaks = now
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


def _near(keeps: _Tried, breaks: _Tried | None, max_kl: float) -> bool:
    if keeps.measured.kl >= CLOSE * max_kl:
        return True
    return breaks is not None and breaks.plan.n_bytes >= SAME_SIZE * keeps.plan.n_bytes


def _next(keeps: _Tried | None, breaks: _Tried | None, too_low: float, max_kl: float) -> float:
    """The prediction to try."""
    if keeps is None or breaks is None:
        (only,) = (tried for tried in (keeps, breaks) if tried is not None)
        factor = _AIM * max_kl / only.measured.kl if only.measured.kl > 0 else _MOST
        asked = only.asked * min(max(factor, _LEAST), _MOST)
        return asked if asked > too_low else math.sqrt(too_low * only.asked)
    low, high = math.log(keeps.asked), math.log(breaks.asked)
    share = 0.5
    if keeps.measured.kl > 0 and math.isfinite(breaks.measured.kl):
        rise = math.log(breaks.measured.kl / keeps.measured.kl)
        share = math.log(_AIM * max_kl / keeps.measured.kl) / rise
    # Well inside, so that every try takes a good part away.
    return math.exp(low + (high - low) * min(max(share, 0.15), 0.85))
