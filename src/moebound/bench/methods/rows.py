"""What one method came to at one size, or why it did not; and all of it together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moebound.bench.methods.making import Made
from moebound.bench.methods.residuals import BaseRow
from moebound.evaluate.evaluation import Evaluation, Scored, compare_to
from moebound.files.documents import fields_of
from moebound.score import Score
from moebound.score.record import finite


@dataclass(frozen=True)
class MethodRow:
    """method: as it was asked for. bits: a weight, that were asked for. removed: percent of the
    experts' bytes that are saved with that, where it was asked so.

    made, score, evaluation: None where there is no such candidate. reason: why there is none;
    nearest: the nearest size that it can come to, None where that is not known. violated: whether
    it is that a store broke its promise.

    kl_sums: of each problem, KL summed over all tokens read and over the solution's.
    """

    method: str
    bits: float
    removed: float | None = None
    made: Made | None = None
    score: Score | None = None
    evaluation: Evaluation | None = None
    kl_sums: tuple[tuple[float, float], ...] = ()
    reason: str | None = None
    nearest: float | None = None
    violated: bool = False

    def to_json(self, baseline: Evaluation) -> dict[str, Any]:
        head = {"method": self.method, "bits": self.bits, "removed": self.removed}
        made = self.made
        if made is None or self.score is None or self.evaluation is None:
            return {
                **head,
                "reached": False,
                "reason": self.reason,
                "nearest_bits_per_weight": self.nearest,
                "violated": self.violated,
            }
        return {
            **head,
            "reached": True,
            **vars(made),
            "bits_per_weight": made.bits_per_weight,
            "whole_bits_per_weight": 8 * made.n_bytes_whole / made.n_parameters,
            "fidelity": self.score.to_json(),
            "total": self.evaluation.total.to_json(),
            "to_original": compare_to(baseline, self.evaluation).to_json(),
        }

    def to_kept(self) -> dict[str, Any]:
        """All of it, for `of_kept`."""
        of = self.evaluation
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "made": None if self.made is None else vars(self.made),
            "score": None if self.score is None else self.score.to_json(),
            "evaluation": of and {"source": of.source, "rows": [row.to_json() for row in of.rows]},
            "kl_sums": [[finite(value) for value in pair] for pair in self.kl_sums],
        }

    @classmethod
    def of_kept(cls, data: Mapping[str, Any], task: str) -> MethodRow:
        """Raises FormatError."""
        with fields_of("rows that are kept"):
            of, made, score = data["evaluation"], data["made"], data["score"]
            return cls(
                **{name: data[name] for name in _PLAIN},
                made=made and Made(**made),
                score=None if score is None else Score.from_json(score),
                evaluation=of
                and Evaluation(of["source"], task, tuple(Scored(**row) for row in of["rows"])),
                kl_sums=tuple(
                    (_number(whole), _number(answer)) for whole, answer in data["kl_sums"]
                ),
            )


_PLAIN = ("method", "bits", "removed", "reason", "nearest", "violated")
"""Fields of a row that JSON has as they are."""


def _number(value: Any) -> float:
    return math.inf if value is None else float(value)


@dataclass(frozen=True)
class MethodsReport:
    """baseline: the original's answers. lengths: of each problem, tokens read, and those of its
    solution. calibration: what statistics are of; None without. bases: what residuals came to
    (`residuals.py`). fisher: what the statistics of `plan:fisher` are of."""

    source: str
    task: str
    n_problems: int
    baseline: Evaluation
    lengths: tuple[tuple[int, int], ...]
    rows: tuple[MethodRow, ...]
    environment: dict[str, Any]
    calibration: dict[str, Any] | None = None
    bases: tuple[BaseRow, ...] = ()
    fisher: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Without claims: `claims.to_json` has them, too."""
        return {
            "format": "moebound.bench.methods",
            "version": 1,
            "source": self.source,
            "task": self.task,
            "n_problems": self.n_problems,
            "calibration": self.calibration,
            "fisher": self.fisher,
            "baseline": asdict(self.baseline.total),
            "rows": [row.to_json(self.baseline) for row in self.rows],
            "residuals": [row.to_json() for row in self.bases],
            "environment": self.environment,
        }
