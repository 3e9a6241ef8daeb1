"""Several models side by side: does what the paper found in one hold for others?

Each model keeps the report of its own study: verdicts, differences and intervals are those of its
own problems, corrected within its own study. Nothing is pooled over models. Models differ in more
than one thing, so a difference between them says that a pattern is not general, not why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moebound.errors import MoeboundError
from moebound.files.formats.study import METRICS
from moebound.paper.report import evidence
from moebound.paper.report.by_layer import Contrast, contrasts
from moebound.paper.report.claims import Claim
from moebound.paper.report.evidence import Outcome
from moebound.paper.report.report import Report
from moebound.paper.report.rules_questions import PATTERNS
from moebound.paper.report.tables import EXTRA, Accuracy, Line, Measured, Table

FORMAT, VERSION = "moebound.models", 1

Together = Literal["all", "none", "differ", "open"]
"""A claim over several models: supported by all, contradicted by all, supported by one and
contradicted by another, or anything else."""


@dataclass(frozen=True)
class Facts:
    """What one study says of its model. top_k, None in a study of the first version: experts that
    a token uses. first_layer: decoder index of the first layer with experts; those before it are
    dense. baseline: by task."""

    model: str
    suite: str
    layers: int
    first_layer: int
    experts: int
    top_k: int | None
    n_problems: int
    finished: int
    conditions: int
    baseline: dict[str, Measured]

    @classmethod
    def of(cls, report: Report) -> Facts:
        study, top_k = report.study, report.study.document.get("top_k")
        found = {table.task: table.baseline for table in report.tables if table.baseline}
        return cls(
            model=study.model,
            suite=study.suite,
            layers=len(study.layers),
            first_layer=study.layers[0],
            experts=study.n_experts,
            top_k=top_k if isinstance(top_k, int) else None,
            n_problems=study.n_problems,
            finished=len(study.rows),
            conditions=len(study.conditions),
            baseline={task: found[task] for task in study.tasks if task in found},
        )

    def to_json(self) -> dict[str, Any]:
        accuracies = {
            task: {metric: _accuracy(cell.accuracy(metric)) for metric in METRICS}
            for task, cell in self.baseline.items()
        }
        return {**vars(self), "baseline": accuracies}


@dataclass(frozen=True)
class Judged:
    """One claim, by model. real: with the real codec, None where the claim has one verdict."""

    claim: Claim
    outcomes: tuple[Outcome, ...]
    real: tuple[Outcome | None, ...]

    @property
    def together(self) -> Together:
        return together(self.outcomes)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.claim.id, "kind": self.claim.kind, "text": self.claim.text,
            "outcomes": list(self.outcomes), "real_codec": list(self.real),
            "together": self.together,
        }  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """One line of a table of the paper with one error source: what the same error at the same
    relative depth did to each model. task: that of each model. measured: None where a model's
    study does not have it."""

    table: str
    where: str
    rate: float | None
    source: str
    tasks: tuple[str, ...]
    depths: tuple[float | None, ...]
    measured: tuple[Measured | None, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "measured": [cell and cell.to_json() for cell in self.measured]}


@dataclass(frozen=True)
class Depth:
    """Whole layers by KL: the middle against both ends, at one source and bound, in each model."""

    task: int
    source: str
    rate: float
    contrasts: tuple[Contrast | None, ...]

    def to_json(self) -> dict[str, Any]:
        found = [
            c and {
                "favours": c.favours, "most_sensitive_layer": c.top.key.layers[0],
                "middle_over_shallow_log": c.to_shallow.to_json(),
                "middle_over_deep_log": c.to_deep.to_json(),
            }
            for c in self.contrasts
        ]  # fmt: skip
        return {**vars(self), "contrasts": found}


@dataclass(frozen=True)
class Models:
    """reports: in the order in which they were given."""

    reports: tuple[Report, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(report.study.model for report in self.reports)

    @property
    def facts(self) -> tuple[Facts, ...]:
        return tuple(map(Facts.of, self.reports))

    @property
    def judged(self) -> tuple[Judged, ...]:
        """Every claim, in the order of one report."""
        found = zip(*(report.verdicts for report in self.reports), strict=True)
        return tuple(
            Judged(
                claim=verdicts[0].claim,
                outcomes=tuple(v.outcome for v in verdicts),
                real=tuple(None if v.real is None else v.real.outcome for v in verdicts),
            )
            for verdicts in found
        )

    @property
    def patterns(self) -> tuple[Judged, ...]:
        """The three that the paper asks about: shallow, middle, deep."""
        return tuple(entry for entry in self.judged if entry.claim.id in PATTERNS)

    @property
    def generalises(self) -> Outcome:
        """Supported: every pattern by every model. Contradicted: one pattern by one model."""
        return evidence.together(o for entry in self.patterns for o in entry.outcomes)

    @property
    def effects(self) -> tuple[Effect, ...]:
        """The lines of the paper's tables, for every source that all models have."""
        lines = [_lines(report) for report in self.reports]
        sources = [s for s in self.reports[0].suite.sources
                   if all(s in report.suite.sources for report in self.reports)]  # fmt: skip
        found = []
        for key in lines[0]:
            there = [of.get(key) for of in lines]
            for source in sources:
                cells = tuple(None if at is None else at[1].measured.get(source) for at in there)
                if any(cells):
                    found.append(
                        Effect(
                            table=key[0], where=key[2], rate=key[3], source=source,
                            tasks=tuple("" if at is None else at[0].task for at in there),
                            depths=tuple(None if at is None else at[1].depth for at in there),
                            measured=cells,
                        )
                    )  # fmt: skip
        return tuple(found)

    @property
    def by_depth(self) -> tuple[Depth, ...]:
        """Where at least one model has it, in the order of the first that does."""
        found = [
            {(r.study.tasks.index(c.task), c.source, c.rate): c for c in contrasts(r.suite)}
            for r in self.reports
        ]
        keys = dict.fromkeys(key for of in found for key in of)
        return tuple(Depth(*key, tuple(of.get(key) for of in found)) for key in keys)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "models": [facts.to_json() for facts in self.facts],
            "gaps": [list(report.gaps) for report in self.reports],
            "generalises": self.generalises,
            "claims": [entry.to_json() for entry in self.judged],
            "by_depth": [entry.to_json() for entry in self.by_depth],
            "effects": [entry.to_json() for entry in self.effects],
        }


def compare_models(reports: Sequence[Report]) -> Models:
    """Put reports side by side.

    Raises MoeboundError for fewer than two, for a model that is given twice, and for studies that
    do not have as many tasks.
    """
    if len(reports) < 2:
        raise MoeboundError(f"expected the studies of two models or more, found {len(reports)}")
    names = [report.study.model for report in reports]
    for name in names:
        if names.count(name) > 1:
            raise MoeboundError(
                f"{names.count(name)} of the studies are of {name}; expected one of each model"
            )
    tasks = [report.study.tasks for report in reports]
    if len(set(map(len, tasks))) > 1:
        said = "; ".join(f"{n}: {', '.join(t)}" for n, t in zip(names, tasks, strict=True))
        raise MoeboundError(
            f"the studies have different numbers of tasks ({said}); expected the same, since the "
            "first task of each stands beside the first of the others"
        )
    return Models(tuple(reports))


def together(outcomes: Sequence[Outcome]) -> Together:
    found = set(outcomes)
    if found == {"supports"}:
        return "all"
    if found == {"contradicts"}:
        return "none"
    return "differ" if {"supports", "contradicts"} <= found else "open"


_Key = tuple[str, int, str, float | None]


def _lines(report: Report) -> dict[_Key, tuple[Table, Line]]:
    """(table, index of the task, the paper's name of the place, bound) -> that line."""
    found: dict[_Key, tuple[Table, Line]] = {}
    for table in report.tables:
        for line in table.lines:
            everywhere = line.layers == report.study.layers
            if line.paper is None and not (table.id == EXTRA and everywhere):
                continue  # further layers and depths are no place of the paper
            where = line.label if line.paper is None else line.paper.label
            at = report.study.tasks.index(table.task)
            found.setdefault((table.id, at, where, line.rate), (table, line))
    return found


def _accuracy(found: Accuracy) -> dict[str, float]:
    return {"share": found.share, "low": found.low, "high": found.high}
