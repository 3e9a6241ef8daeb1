"""What a plan loses, measured, to stand beside what was predicted.

Predictions of plans are too low. Of many experts a planner widens those whose losses are taken for
too small (the optimizer's curse), the text it plans with is no other text, and what many errors do
together is not their sum. To measure a plan takes a pass over some text. What measures is given as
a function, so that this folder loads no model; `sensitivity/trial.py` has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moebound.errors import PlanError
from moebound.files.documents import count, number


@dataclass(frozen=True)
class Measured:
    """KL to the original with all experts changed as planned, nats a token of the solutions.

    stderr: its standard error, problems being the sample; NaN for one problem. task, n_problems:
    the text, which nothing that the plan is made from has read. exact: False where the rare tokens
    of a large vocabulary were taken for one, which makes it a lower limit. n_tried: plans measured
    on these problems until this one was taken.
    """

    kl: float
    stderr: float
    task: str
    n_problems: int
    exact: bool = True
    n_tried: int = 1

    def after(self, n_tried: int) -> Measured:
        return replace(self, n_tried=n_tried)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "kl": _finite(self.kl), "stderr": _finite(self.stderr)}

    @classmethod
    def from_json(cls, data: Any) -> Measured:
        """Raises PlanError, FormatError."""
        if not isinstance(data, Mapping):
            raise PlanError(f"measured: expected an object, found {str(data)[:40]!r}")
        kl, stderr = data.get("kl"), data.get("stderr")
        return cls(
            math.inf if kl is None else number(kl, "measured: kl"),
            math.nan if stderr is None else number(stderr, "measured: stderr"),
            str(data.get("task", "")),
            count(data.get("n_problems"), "measured: n_problems"),
            bool(data.get("exact", True)),
            count(data.get("n_tried", 1), "measured: n_tried"),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
