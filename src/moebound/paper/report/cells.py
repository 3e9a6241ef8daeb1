"""Rows that differ in nothing but the noise seed belong together: a cell is the report's unit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moebound.files.formats.study import BASELINE, Metric, Row, Study
from moebound.paper.report.compare import LEVEL
from moebound.score import READ
from moebound.score.record import DOWN_SHARE
from moebound.score.statistics import wilson
from moebound.types import Array

RANDOMISED = "randomise"
CODEC_PREFIX = "codec:"
NO_OUTPUT = DOWN_SHARE
"""Below this share of valid outputs a model counts as silent, and the tables have "/"."""

SOURCE_NAMES = {
    "gaussian-sd": "paper's Gaussian, sd ε",
    "gaussian-var": "Gaussian, variance ε",
    "gaussian-power": "Gaussian, sd ε/√3",
    "uniform": "uniform in ±ε",
    RANDOMISED: "randomised",
    BASELINE: "no error",
}
_ORDER = [*SOURCE_NAMES]


Figure = tuple[float, float, float]
"""Mean, lowest and highest over seeds."""


class CellKey(NamedTuple):
    table: str
    task: str
    selector: str
    layers: tuple[int, ...]
    rate: float | None
    source: str


@dataclass(frozen=True, eq=False)
class Cell:
    """One condition over all of its seeds. depth: 0 the first MoE layer, 1 the last."""

    key: CellKey
    label: str
    depth: float
    rows: tuple[Row, ...]

    @cached_property
    def answered(self) -> tuple[Row, ...]:
        """The seeds whose problems were answered; the others were only read, for their KL."""
        return tuple(row for row in self.rows if row.n)

    @property
    def n(self) -> int:
        """Problems, of the seed with the fewest; 0 if none was answered."""
        return min((row.n for row in self.answered), default=0)

    def right(self, metric: Metric) -> list[Array]:
        return [row.right[metric] for row in self.answered]

    def share(self, metric: Metric) -> float:
        """Of right answers, the mean over seeds; NaN if none was answered."""
        shares = [getattr(row, metric) / row.n for row in self.answered]
        return float(np.mean(shares)) if shares else math.nan

    def interval(self, metric: Metric) -> tuple[float, float]:
        """Wilson's, as if there were one seed: seeds answer the same problems, so more of them
        make the problems no more representative."""
        return share_interval(self.share(metric), self.n)

    @property
    def valid(self) -> float:
        """Share of outputs that have an answer at all; NaN if nothing was asked."""
        shares = [row.valid / row.n for row in self.answered]
        return float(np.mean(shares)) if shares else math.nan

    @property
    def silent(self) -> bool:
        return self.valid < NO_OUTPUT

    def values(self, name: str) -> tuple[float, ...]:
        """A figure of the scores, by seed; of those that have it."""
        found = (getattr(row.score, name) for row in self.rows)
        return tuple(value for value in found if math.isfinite(value))

    @property
    def figures(self) -> dict[str, Figure]:
        """What was read, by the figure's name in a Score."""
        named = {field.name: self.values(field.name) for field in READ}
        return {
            name: (float(np.mean(values)), min(values), max(values))
            for name, values in named.items()
            if values
        }

    @cached_property
    def kls(self) -> tuple[float, ...]:
        """Nats a token of the solutions, by seed: what conditions are compared by."""
        return self.values("answer_kl_nats")

    @property
    def kl(self) -> float | None:
        return float(np.mean(self.kls)) if self.kls else None

    @property
    def bits_per_weight(self) -> float | None:
        """Of the experts that were encoded; None for a simulated error."""
        found = [row.realised.get("bits_per_weight") for row in self.rows]
        numbers = [float(value) for value in found if isinstance(value, (int, float))]
        return float(np.mean(numbers)) if numbers else None


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's, at the report's level; everything is possible without a problem."""
    if not n:
        return 0.0, 1.0
    found = wilson(round(share * n), n, confidence=LEVEL)
    return found.low, found.high


def cells(study: Study) -> list[Cell]:
    """All of a study's, the baselines not among them, in the order of its conditions."""
    groups: dict[CellKey, list[Row]] = defaultdict(list)
    asked = {condition.id: index for index, condition in enumerate(study.conditions)}
    last = len(asked)
    for row in sorted(study.rows, key=lambda row: asked.get(row.condition, last)):
        if row.source != BASELINE:
            key = CellKey(row.table, row.task, row.selector, row.layers, row.rate, row.source)
            groups[key].append(row)
    return [
        Cell(key, rows[0].label, study.depth(key.layers), tuple(rows))
        for key, rows in groups.items()
    ]


def source_name(source: str) -> str:
    """What to call an error source on the page."""
    if source.startswith(CODEC_PREFIX):
        return f"real codec {source.removeprefix(CODEC_PREFIX)}"
    return SOURCE_NAMES.get(source, source)


def in_order(sources: Iterable[str]) -> list[str]:
    """Simulations first, as the paper comes first; then codecs, ours before the others."""

    def rank(source: str) -> tuple[int, str]:
        if source in _ORDER:
            return _ORDER.index(source), source
        return (len(_ORDER) + (source != f"{CODEC_PREFIX}bound"), source)

    return sorted(set(sources), key=rank)
