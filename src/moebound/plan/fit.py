"""Plans within a budget of real bytes, where sizes of items are near and not exact."""

from __future__ import annotations

from collections.abc import Callable

from moebound.errors import PlanError
from moebound.plan.plan import Plan

_FULL = 0.9985
"""A plan that fills so much of its budget is not made anew to fill more."""
_ENOUGH = 4
_MOST = 12


class Fit:
    """n_bytes: what a plan really takes; None where sizes of items are believed.

    How far off sizes are together is found by encoding a plan, and the next one's budget is set
    right by it, so that one that is much like it takes one try.
    """

    def __init__(self, budget_bytes: int, n_bytes: Callable[[Plan], int] | None = None) -> None:
        self.budget_bytes, self._n_bytes = budget_bytes, n_bytes
        self._off = 1.0

    def __call__(self, make: Callable[[int], Plan]) -> Plan:
        """The largest plan found that takes no more than the budget. make: one whose predicted size
        is so many bytes at most.

        Raises PlanError where the budget cannot be met.
        """
        if self._n_bytes is None:
            return make(self.budget_bytes)
        best: Plan | None = None
        most, off = 0, self._off
        for tried in range(_MOST):
            plan = make(int(self.budget_bytes / off))
            real = self._n_bytes(plan)
            if most < real <= self.budget_bytes:
                best, most, self._off = plan, real, off
            if most >= _FULL * self.budget_bytes or (best is not None and tried + 1 >= _ENOUGH):
                break
            # A little more for each time it was over, so that it ends.
            over = 1 + 2e-4 * (tried + 1) if real > self.budget_bytes else 1.0
            off *= real / self.budget_bytes * over
        if best is None:
            raise PlanError(
                f"a budget of {self.budget_bytes} bytes cannot be met: plans of about this size "
                "took more when they were encoded"
            )
        return best
