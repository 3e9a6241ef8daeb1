"""What a search measures, kept in a file beside the plan: killed, the next run goes on from there.

A search is the same for the same measurements, so it needs no more than these to take up where it
was. Sizes are kept beside losses: nothing is encoded again to find out that it is too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moebound.plan import Measured, Plan
from moebound.score import Score
from moebound.score.record import finite
from moebound.sensitivity.map.rows import Rows
from moebound.sensitivity.trial import Trial
from moebound.types import ExpertKey


class Tries:
    """trial_of: what measures, made when it is needed. encoded: what plans take. path: of the plan;
    the rows are beside it. header: what they are of; rows of something else are refused.

    Raises as `Rows` does.
    """

    def __init__(
        self,
        trial_of: Callable[[], Trial],
        encoded: Callable[[Plan], Mapping[ExpertKey, int]],
        path: Path,
        header: dict[str, Any],
    ) -> None:
        self._trial_of, self._encoded = trial_of, encoded
        self._rows = Rows(path, {"rows": "moebound.plan.search", "version": 1, **header})
        self._measured = {
            (row["plan"], row["layer"], row["expert"]): _read(row)
            for row in self._rows.found
            if "score" in row
        }
        self._sizes = {row["plan"]: row["sizes"] for row in self._rows.found if "sizes" in row}
        self.n_found = len(self._rows.found)

    @cached_property
    def _trial(self) -> Trial:
        return self._trial_of()

    def sizes(self, plan: Plan) -> dict[ExpertKey, int]:
        """What its experts take."""
        if plan.sha256 not in self._sizes:
            found = self._encoded(plan)
            self._sizes[plan.sha256] = [found[expert.key] for expert in plan.experts]
            self._rows.append({"plan": plan.sha256, "sizes": self._sizes[plan.sha256]})
        keys = [expert.key for expert in plan.experts]
        return dict(zip(keys, self._sizes[plan.sha256], strict=True))

    def measure(self, plan: Plan, layer: int | None = None, expert: int | None = None) -> Measured:
        """What it loses, or one layer of it, or one expert."""
        name = plan.sha256, layer, expert
        if name not in self._measured:
            found = self._trial.measure(plan, layer, expert)
            of = {"plan": plan.sha256, "layer": layer, "expert": expert}
            self._rows.append({**of, **_written(found)})
            self._measured[name] = found
        return self._measured[name]

    def close(self) -> None:
        """What is measured is kept; where nothing is, nothing is left."""
        if self._sizes or self._measured:
            self._rows.close()
        else:
            self._rows.remove()

    def remove(self) -> None:
        """The plan is written: the rows have done their work."""
        self._rows.remove()


def _written(found: Measured) -> dict[str, Any]:
    sums = [[finite(value) for value in pair] for pair in found.score.kl_sums]
    return {"task": found.task, "tokens": found.tokens, "score": found.score.to_json(),
            "kl_sums": sums}  # fmt: skip


def _read(row: Mapping[str, Any]) -> Measured:
    sums = tuple(
        (math.inf if a is None else a, math.inf if b is None else b) for a, b in row["kl_sums"]
    )
    score = replace(Score.from_json(row["score"]), kl_sums=sums)
    return Measured(score, row["task"], tokens=row["tokens"])
