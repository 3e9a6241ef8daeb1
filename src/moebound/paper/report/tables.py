"""The paper's tables as this study measured them, each line beside the paper's own numbers.

A table has a line for each place and size of the error and a column group for each error source,
so that simulated and real errors stand side by side. Its first line is the model without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moebound.files.formats.study import METRICS, Condition, Metric, Row, Study
from moebound.paper.report import paper
from moebound.paper.report.cells import RANDOMISED, Cell, Figure, in_order, share_interval
from moebound.paper.report.compare import FLOOR, Difference
from moebound.paper.report.evidence import plural
from moebound.paper.report.paper import PaperRow, PaperTable
from moebound.paper.report.suite import Suite

Mark = Literal["lower", "higher", "same", ""]
EXTRA = "extra"


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with Wilson's interval, and the difference to the baseline.

    mark: "lower" or "higher" beyond chance after the correction; "same" if the interval of the
    difference lies within the margin; "" if neither can be said.
    """

    share: float
    low: float
    high: float
    difference: Difference | None
    mark: Mark

    def to_json(self) -> dict[str, Any]:
        difference = None if self.difference is None else self.difference.to_json()
        return {**vars(self), "difference": difference}


@dataclass(frozen=True)
class Measured:
    """What one cell of a table shows. seeds: how many draws of noise. figures: of the predictions,
    by their name in a Score."""

    source: str
    ica: Accuracy
    pia: Accuracy
    silent: bool
    valid: float
    figures: Mapping[str, Figure]
    bits_per_weight: float | None
    seeds: int
    n: int

    def accuracy(self, metric: Metric) -> Accuracy:
        return self.ica if metric == "ica" else self.pia

    def to_json(self) -> dict[str, Any]:
        """kl, top1: what the first version had of the figures."""
        top1 = self.figures.get("answer_top1_agreement")
        return {
            **vars(self),
            "ica": self.ica.to_json(),
            "pia": self.pia.to_json(),
            "kl": self.figures.get("answer_kl_nats"),
            "top1": None if top1 is None else top1[0],
        }


@dataclass(frozen=True)
class Line:
    """paper: the paper's line that this one stands beside, None if it has none."""

    label: str
    layers: tuple[int, ...]
    depth: float | None
    rate: float | None
    paper: PaperRow | None
    measured: dict[str, Measured]

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "paper": None if self.paper is None else vars(self.paper),
            "measured": {name: cell.to_json() for name, cell in self.measured.items()},
        }


@dataclass(frozen=True)
class Table:
    """sources: the columns, in order. missing: conditions of this table that are not finished."""

    id: str
    name: str
    title: str
    section: str
    task: str
    baseline: Measured | None
    paper_baseline: PaperRow | None
    sources: tuple[str, ...]
    lines: tuple[Line, ...]
    missing: int

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "baseline": None if self.baseline is None else self.baseline.to_json(),
            "paper_baseline": None if self.paper_baseline is None else vars(self.paper_baseline),
            "lines": [line.to_json() for line in self.lines],
        }


def make_tables(suite: Suite) -> tuple[Table, ...]:
    """All tables that the study has or asks for, in the paper's order, then what is extra.

    Call it after `verdicts.judge`: marks are of corrected comparisons.
    """
    study = suite.study
    order = [table.id for table in paper.TABLES]
    asked = [(c.table, c.task) for c in study.conditions] + [
        (cell.key.table, cell.key.task) for cell in suite.cells
    ]
    baselines = {c.id for c in study.conditions if _is_baseline(c, study)}
    only_baseline = {
        key for key in asked
        if all(c.id in baselines for c in study.conditions if (c.table, c.task) == key)
        and not any((cell.key.table, cell.key.task) == key for cell in suite.cells)
    }  # fmt: skip
    keys = sorted(
        {key for key in asked if key not in only_baseline},
        key=lambda key: (
            order.index(key[0]) if key[0] in order else len(order),
            study.tasks.index(key[1]) if key[1] in study.tasks else len(study.tasks),
            key,
        ),
    )
    return tuple(_table(suite, name, task) for name, task in keys)


def _is_baseline(condition: Condition, study: Study) -> bool:
    row = next((row for row in study.rows if row.condition == condition.id), None)
    return row is not None and row.source == "none"


def _table(suite: Suite, name: str, task: str) -> Table:
    known = paper.table(name)
    found = [c for c in suite.cells if c.key.table == name and c.key.task == task]
    if name == "4":
        shared = [c for s in suite.sources for c in suite.table("4", s) if c.key.task == task]
        found = [*(c for c in shared if c not in found), *found]
    lines: dict[tuple[object, ...], list[Cell]] = {}
    for cell in found:
        place = (cell.key.selector, cell.key.layers, cell.key.rate, cell.key.source == RANDOMISED)
        lines.setdefault(place, []).append(cell)
    # A randomised expert has a line of its own, and is in no column of its own beside it.
    sources = in_order(c.key.source for c in found if c.key.source != RANDOMISED)
    row = suite.study.baseline(task)
    return Table(
        id=name,
        name=known.name if known else ("Further conditions" if name == EXTRA else name),
        title=known.title if known else "",
        section=known.section if known else "",
        task=task,
        baseline=None if row is None else _baseline(row),
        paper_baseline=next((r for r in known.rows if r.depth is None), None) if known else None,
        sources=tuple(sources or [RANDOMISED]),
        lines=tuple(_line(suite, cells, known) for cells in lines.values()),
        missing=sum(c.table == name and c.task == task for c in suite.study.missing),
    )


def _line(suite: Suite, cells: list[Cell], known: PaperTable | None) -> Line:
    first = cells[0]
    beside = None
    if known is not None:
        randomised = first.key.source == RANDOMISED
        beside = known.nearest(first.depth, first.key.rate, randomised=randomised)
    elif (given := first.rows[0].paper) is not None:
        silent = given == (None, None)
        beside = PaperRow(first.label, first.depth, first.key.rate, *given, no_output=silent)
    return Line(
        label=first.label,
        layers=first.key.layers,
        depth=first.depth,
        rate=first.key.rate,
        paper=beside,
        measured={cell.key.source: _measured(suite, cell) for cell in cells},
    )


def _measured(suite: Suite, cell: Cell) -> Measured:
    ica, pia = (_accuracy(suite, cell, metric) for metric in METRICS)
    return Measured(
        source=cell.key.source,
        ica=ica,
        pia=pia,
        silent=cell.silent,
        valid=cell.valid,
        figures=cell.figures,
        bits_per_weight=cell.bits_per_weight,
        seeds=len(cell.rows),
        n=cell.n,
    )


def _accuracy(suite: Suite, cell: Cell, metric: Metric) -> Accuracy:
    difference = suite.to_baseline(cell, metric)
    return Accuracy(cell.share(metric), *cell.interval(metric), difference, _mark(difference))


def _mark(difference: Difference | None) -> Mark:
    if difference is None:
        return ""
    if difference.lower:
        return "lower"
    if difference.higher:
        return "higher"
    return "same" if difference.unchanged else ""


def _baseline(row: Row) -> Measured:
    def accuracy(count: int) -> Accuracy:
        share = count / max(row.n, 1)
        return Accuracy(share, *share_interval(share, row.n), None, "")

    return Measured(
        source=row.source,
        ica=accuracy(row.ica),
        pia=accuracy(row.pia),
        silent=False,
        valid=row.valid / max(row.n, 1),
        figures={},
        bits_per_weight=None,
        seeds=1,
        n=row.n,
    )


def gaps(study: Study) -> tuple[str, ...]:
    """What is not there, in words; empty for a finished study."""
    found = []
    if study.missing:
        rest = plural(len(study.missing), "condition")
        found.append(f"{rest} of {len(study.conditions)} not measured yet")
    found += [
        f"no baseline for task {task}: nothing can be compared on it"
        for task in study.tasks
        if study.baseline(task) is None
    ]
    for task in study.tasks:
        row = study.baseline(task)
        if row is not None and row.n and row.pia < FLOOR * row.n:
            share = f"{row.pia} of {row.n} right"
            found.append(f"on task {task} the model without an error has {share}: nothing to lose")
    absent = [
        table.name
        for table in paper.TABLES
        if not any(condition.table == table.id for condition in study.conditions)
    ]
    if absent:
        found.append(f"not in this study: {', '.join(absent)}")
    if not any(row.residual or row.routing for row in study.rows):
        found.append("no residual or routing changes recorded")
    if study.profile is None or not study.profile.is_file():
        found.append("no routing profile in the study's folder")
    return tuple(found)
