"""What is promised for each matrix: one bound for all, or a plan's."""

from __future__ import annotations

from dataclasses import dataclass

from moebound.checkpoint import Expert
from moebound.codec import get_codec
from moebound.errors import PlanError
from moebound.plan import Plan
from moebound.types import ErrorBound


@dataclass(frozen=True)
class Promise:
    """bound: of every weight; of a plan, the widest. codec: an id, options behind a colon."""

    bound: ErrorBound
    codec: str
    plan: Plan | None = None

    @classmethod
    def of(cls, bound: ErrorBound | Plan, codec: str | None) -> Promise:
        """Raises CodecError for an unknown codec, BackendUnavailable for one whose library is not
        installed, PlanError for another than the plan's."""
        if isinstance(bound, Plan):
            if codec not in (None, bound.codec):
                raise PlanError(f"codec {codec!r}: the plan was made for {bound.codec!r}")
            made = cls(bound.widest, bound.codec, bound)
        else:
            made = cls(bound, codec or "bound")
        get_codec(made.codec).check_installed()
        return made

    def bounds(self, expert: Expert) -> list[ErrorBound]:
        """Of an expert's matrices, in their order."""
        if self.plan is None:
            return [self.bound] * len(expert.matrices)
        planned = self.plan[expert.key].bounds
        return [planned[matrix.role] for matrix in expert.matrices]

    @property
    def with_shared(self) -> bool:
        """Whether a plan has bounds for shared experts."""
        return self.plan is not None and any(e.key.shared for e in self.plan.experts)
