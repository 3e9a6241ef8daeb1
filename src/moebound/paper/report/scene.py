"""What rules share: the cells of one error source, named, and pairs of them judged.

A pair is judged by accuracy first, since the paper's conclusions are about it. Where no accuracy is
decisive, KL decides, which sees far smaller effects; a finding says which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moebound.files.formats.study import METRICS, Metric
from moebound.paper.report.cells import RANDOMISED, Cell
from moebound.paper.report.evidence import (
    Evidence,
    Favours,
    Finding,
    balance,
    factor,
    points,
    tally,
    together,
)
from moebound.paper.report.suite import DEEP, SHALLOW, Suite

Pair = tuple[Cell, Cell]


@dataclass(frozen=True)
class Scene:
    """A suite seen through one error source."""

    suite: Suite
    source: str

    def table(self, name: str, rates: Sequence[float] | None = None) -> list[Cell]:
        return self.suite.table(name, self.source, rates=rates)

    def by_position(self, *names: str) -> list[list[Cell]]:
        """For each table, task and rate the cells at different depths, from shallow to deep."""
        found: dict[tuple[str, str, float | None], list[Cell]] = {}
        for name in names:
            for cell in self.table(name):
                found.setdefault((name, cell.key.task, cell.key.rate), []).append(cell)
        return [group for group in found.values() if len({c.depth for c in group}) > 1]

    def against_baseline(
        self,
        cells: Sequence[Cell],
        judge: Callable[..., Favours],
        metrics: Sequence[Metric] = METRICS,
    ) -> list[Evidence]:
        """Each cell's difference to the baseline, judged."""
        found = []
        for cell in cells:
            for metric in metrics:
                difference = self.suite.to_baseline(cell, metric)
                if difference is not None:
                    text = f"{named(cell)}: {metric.upper()} {points(difference)}"
                    found.append(Evidence(text, judge(difference)))
        return found

    def worse(
        self, pairs: Sequence[Pair], what: str, metrics: Sequence[Metric] = ("pia",)
    ) -> Finding:
        """Does an error in the first of each pair hurt more than one in the second?"""  # fmt: skip
        by_accuracy, by_kl = [], []
        for a, b in pairs:
            for metric in metrics:
                difference = self.suite.between(a, b, metric)
                if difference is not None:
                    favours: Favours = (
                        "for" if difference.lower else "against" if difference.higher else "neither"
                    )
                    text = f"{named(a)} minus {named(b)}: {metric.upper()} {points(difference)}"
                    by_accuracy.append(Evidence(text, favours))
            ratio = self.suite.kl_between(a, b)
            if ratio is not None:
                favours = "for" if ratio.higher else "against" if ratio.lower else "neither"
                text = f"{named(a)} over {named(b)}: KL {factor(ratio)}"
                by_kl.append(Evidence(text, favours))
        if pairs and not by_accuracy and not by_kl:
            why = "Read for KL alone, with one noise seed: it cannot be told from the draw's luck."
            return Finding("open", why)
        return first_decisive(what, ("accuracy", by_accuracy), ("KL", by_kl))


def first_decisive(what: str, *measures: tuple[str, list[Evidence]]) -> Finding:
    """The outcome of the first measure in which anything is significant, with all evidence."""
    shown = tuple(piece for _, evidence in measures for piece in evidence)
    if not shown:
        return Finding("open", f"Not measured: {what}.")
    for name, evidence in measures:
        if any(piece.favours != "neither" for piece in evidence):
            return Finding(balance(evidence), f"By {name}: {tally(evidence)}.", shown)
    return Finding("open", f"Nothing significant: {tally(shown)}.", shown)


def named(cell: Cell) -> str:
    """ "L13 most used, 80 %, wordmath"."""
    rate = "" if cell.key.rate is None else f", {100 * cell.key.rate:g} %"
    rate = ", randomised" if cell.key.source == RANDOMISED else rate
    return f"{cell.label}{rate} ({cell.key.task})"


def shallow(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.depth <= SHALLOW]


def deep(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.depth >= DEEP]


def middle(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if SHALLOW < cell.depth < DEEP]


def all_of(*findings: Finding) -> Finding:
    """Of a claim of several parts (`evidence.together`), with all that was found."""
    return Finding(
        together(finding.outcome for finding in findings),
        " ".join(finding.why for finding in findings),
        tuple(piece for finding in findings for piece in finding.evidence),
    )
