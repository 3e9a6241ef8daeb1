"""The report as data: what the page shows and `--json` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moebound.files.formats.study import Study
from moebound.paper.report import verdicts
from moebound.paper.report.compare import ALPHA, MARGIN
from moebound.paper.report.suite import Suite
from moebound.paper.report.tables import Table, gaps, make_tables
from moebound.paper.report.verdicts import Verdict

FORMAT, VERSION = "moebound.report", 1


@dataclass(frozen=True)
class Report:
    """gaps: what the study does not have, in words; empty if it is finished."""

    study: Study
    suite: Suite
    tables: tuple[Table, ...]
    verdicts: tuple[Verdict, ...]
    gaps: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Outcome -> conclusions of the paper, by its own simulation."""
        judged = [v.outcome for v in self.verdicts if v.claim.kind == "conclusion"]
        return {name: judged.count(name) for name in ("supports", "contradicts", "open")}

    def verdict(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.claim.id == name)

    def to_json(self) -> dict[str, Any]:
        study = self.study
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": study.model,
            "suite": study.suite,
            "tasks": list(study.tasks),
            "n_problems": study.n_problems,
            "n_conditions": len(study.conditions),
            "n_finished": len(study.rows),
            "gaps": list(self.gaps),
            "statistics": {
                "alpha": ALPHA,
                "margin": MARGIN,
                "correction": "holm",
                "n_comparisons": self.suite.n_comparisons,
            },
            "counts": self.counts,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "tables": [table.to_json() for table in self.tables],
        }


def make_report(study: Study) -> Report:
    """Judge and tabulate. Deterministic: the same rows give the same report."""
    suite = Suite.of(study)
    judged = verdicts.judge(suite)
    return Report(study, suite, make_tables(suite), judged, gaps(study))
