"""All cells of a study and every comparison that the report makes, corrected together.

A comparison is asked for by whoever needs it; `sealed` then corrects all that were asked (Holm,
over the whole suite), and from then on answers come with the corrected p-value. So whoever asks
must ask the same before and after: rules collect first and decide then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moebound.files.formats.study import METRICS, Metric, Study
from moebound.paper.report import compare, student
from moebound.paper.report.cells import CODEC_PREFIX, Cell, cells, in_order
from moebound.paper.report.compare import Difference, Spread
from moebound.paper.report.paper import SIMULATION
from moebound.score.statistics import holm
from moebound.types import Array

SHALLOW, DEEP = 0.3, 0.7
"""Depths: shallow up to here, deep from here; the paper's L1 and G1, L20, L26 and G3."""


@dataclass
class Suite:
    study: Study
    cells: list[Cell]
    _asked: dict[tuple[object, ...], Difference | None] = field(default_factory=dict)
    _sealed: bool = False

    @classmethod
    def of(cls, study: Study) -> Suite:
        return cls(study, cells(study))

    # What there is

    @property
    def sources(self) -> list[str]:
        return in_order(cell.key.source for cell in self.cells)

    @property
    def simulation(self) -> str:
        return SIMULATION

    @property
    def codec(self) -> str | None:
        """The real codec to judge by: `bound` if it is there, else the first."""
        found = [source for source in self.sources if source.startswith(CODEC_PREFIX)]
        return found[0] if found else None

    def table(self, name: str, source: str, *, rates: Sequence[float] | None = None) -> list[Cell]:
        """The cells of one of the paper's tables, from shallow to deep.

        Table 4's first layer is Table 3's last line: where the study measured it once, it counts
        in both.
        """
        found = [cell for cell in self.cells if cell.key.table == name]
        if name == "4":
            there = {(c.key.layers, c.key.rate, c.key.source) for c in found}
            found += [
                cell for cell in self.cells
                if cell.key.table == "3" and cell.key.rate == 0.8
                and (cell.key.layers, cell.key.rate, cell.key.source) not in there
            ]  # fmt: skip
        chosen = [
            cell for cell in found
            if cell.key.source == source and (rates is None or cell.key.rate in rates)
        ]  # fmt: skip
        return sorted(chosen, key=lambda cell: (cell.depth, cell.key.rate or 0.0))

    # Comparisons

    def to_baseline(self, cell: Cell, metric: Metric) -> Difference | None:
        """Accuracy minus that without an error; None where the baseline is not measured yet."""
        baseline = self.study.baseline(cell.key.task)
        if baseline is None or not baseline.n or not cell.n:
            return None
        return self._ask(
            (cell.key, "baseline", metric),
            lambda: _with_room(
                compare.paired(cell.right(metric), [baseline.right[metric]]),
                float(baseline.right[metric].mean()),
            ),
        )

    def between(self, a: Cell, b: Cell, metric: Metric) -> Difference | None:
        """Accuracy of A minus that of B; None for different tasks, or if one has no answers."""
        if a.key.task != b.key.task or not a.n or not b.n:
            return None
        return self._ask(
            (a.key, b.key, metric), lambda: compare.paired(a.right(metric), b.right(metric))
        )

    def decoupled(self, cell: Cell) -> Difference | None:
        """How much more ICA changed than PIA did, both against the baseline."""
        baseline = self.study.baseline(cell.key.task)
        if baseline is None or not baseline.n or not cell.n:
            return None
        n, k = min(cell.n, baseline.n), len(cell.answered)

        def change(metric: Metric) -> Array:
            seeds = np.sum([right[:n] for right in cell.right(metric)], axis=0, dtype=np.int64)
            return seeds - k * baseline.right[metric][:n]

        return self._ask(
            (cell.key, "ica - pia"), lambda: compare.of_scores(change("ica") - change("pia"), k)
        )

    def across_tasks(self, hard: Cell, easy: Cell, metric: Metric) -> Difference | None:
        """The change on one task minus that on another; other problems, so unpaired."""
        a, b = self.to_baseline(hard, metric), self.to_baseline(easy, metric)
        if a is None or b is None:
            return None

        def both() -> Difference:
            value = (a.low + a.high - b.low - b.high) / 2
            half = float(np.hypot(a.high - a.low, b.high - b.low)) / 2
            p = student.two_sided(1.96 * value / half, 1e6) if half else 1.0
            return Difference(value, value - half, value + half, p, a.n + b.n)

        return self._ask((hard.key, easy.key, "tasks", metric), both)

    def kl_between(self, a: Cell, b: Cell) -> Difference | None:
        """log(KL of A / KL of B), with the spread between the seeds of A's and B's tables."""
        if a.key.task != b.key.task:
            return None
        spread = self.spread(a.key.table, b.key.table)
        return self._ask((a.key, b.key, "kl"), lambda: compare.kl_ratio(a.kls, b.kls, spread))

    def mean_ratio(self, name: str, ratios: Sequence[float]) -> Difference | None:
        """The mean log of these, the conditions being the sample."""
        return self._ask((name,), lambda: compare.mean_log(ratios))

    def asked(self, name: str, compute: Callable[[], Difference | None]) -> Difference | None:
        """Any other comparison, by a name of its own."""
        return self._ask((name,), compute)

    def spread(self, *tables: str) -> Spread | None:
        groups = [cell.kls for cell in self.cells if cell.key.table in tables]
        return Spread.pooled([group for group in groups if group and min(group) > 0])

    # Correction

    @property
    def n_comparisons(self) -> int:
        return sum(difference is not None for difference in self._asked.values())

    def ask_tables(self) -> None:
        """What the tables show: every cell against its baseline, in both metrics."""
        for cell in self.cells:
            for metric in METRICS:
                self.to_baseline(cell, metric)

    def seal(self) -> None:
        """Correct everything that was asked, by Holm's method."""
        keys = [key for key, found in self._asked.items() if found is not None]
        found = [difference for difference in self._asked.values() if difference is not None]
        adjusted = holm([difference.p for difference in found])
        for key, difference, p in zip(keys, found, adjusted, strict=True):
            self._asked[key] = replace(difference, adjusted=float(p))
        self._sealed = True

    def _ask(
        self, key: tuple[object, ...], compute: Callable[[], Difference | None]
    ) -> Difference | None:
        if key not in self._asked:
            if self._sealed:
                raise RuntimeError(f"comparison asked after the correction: {key}")
            self._asked[key] = compute()
        return self._asked[key]


def _with_room(difference: Difference, share: float) -> Difference:
    return replace(difference, can_fall=share, can_rise=1 - share)
