"""Whole layers, each alone, by what an error does to the predictions: the sensitivity by depth.

Answers take minutes a condition and move in steps of a problem; KL takes seconds and sees every
layer. So this, not the four layers of the paper's tables, is what says where the middle stands.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moebound.paper.report import evidence as ev
from moebound.paper.report.cells import Cell
from moebound.paper.report.compare import Difference, by_student
from moebound.paper.report.evidence import Evidence, Favours, Finding, factor
from moebound.paper.report.scene import deep, middle, shallow
from moebound.paper.report.suite import Suite

FEWEST = 2
"""Layers of a kind, below which their spread is not known. Of 8 layers, 2 are the middle."""


@dataclass(frozen=True)
class Contrast:
    """The middle layers against the shallow and the deep ones, by one source at one bound.

    top: the cell of the most sensitive layer. to_shallow, to_deep: log of the ratio of geometric
    mean KL, the middle's over the others'.
    """

    task: str
    source: str
    rate: float
    top: Cell
    to_shallow: Difference
    to_deep: Difference

    @property
    def favours(self) -> Favours:
        """ "for" where the middle is above both ends, "against" where it is below one."""
        if self.to_shallow.higher and self.to_deep.higher:
            return "for"
        return "against" if self.to_shallow.lower or self.to_deep.lower else "neither"


def whole_layers(suite: Suite) -> dict[tuple[str, str, float], dict[int, Cell]]:
    """(task, source, rate) -> decoder index -> the cell with an error in all experts there."""
    found: dict[tuple[str, str, float], dict[int, Cell]] = {}
    for cell in suite.cells:
        key = cell.key
        whole = key.selector == f"layer:{key.layers[0]}" and len(key.layers) == 1
        if whole and key.rate is not None and cell.kl is not None:
            at = found.setdefault((key.task, key.source, key.rate), {})
            # One that was answered as well has the more seeds.
            if key.layers[0] not in at or len(cell.kls) > len(at[key.layers[0]].kls):
                at[key.layers[0]] = cell
    return found


def contrasts(suite: Suite) -> list[Contrast]:
    """One for each task, source and bound that has enough layers of each kind."""
    found = []
    for (task, source, rate), at in whole_layers(suite).items():
        cells = [cell for _, cell in sorted(at.items()) if min(cell.kls) > 0]
        low, mid, high = shallow(cells), middle(cells), deep(cells)
        if min(map(len, (low, mid, high))) < FEWEST:
            continue
        name = f"{task} {source} {rate:g}"
        to_shallow = suite.asked(f"{name} shallow", partial(_between, mid, low))
        to_deep = suite.asked(f"{name} deep", partial(_between, mid, high))
        if to_shallow is not None and to_deep is not None:
            top = max(cells, key=lambda cell: cell.kl or 0.0)
            found.append(Contrast(task, source, rate, top, to_shallow, to_deep))
    return found


def most_sensitive(suite: Suite) -> Finding:
    """Is it the middle? For each source and bound, the middle layers against the rest."""
    compared = contrasts(suite)
    if not compared:
        return ev.missing("every layer as a whole")
    found = [
        Evidence(
            f"{c.source}, {100 * c.rate:g} % ({c.task}): most sensitive is layer "
            f"{c.top.key.layers[0]} (KL {c.top.kl:.2g}); middle over shallow "
            f"{factor(c.to_shallow)}; middle over deep {factor(c.to_deep)}",
            c.favours,
        )
        for c in compared
    ]
    words = ("where the middle is above both ends", "where it is below one")
    tops = Counter(c.top.key.layers[0] for c in compared)
    most = ", ".join(f"layer {layer} ({times} times)" for layer, times in tops.most_common(3))
    why = f"Over sources and bounds, {ev.tally(found, words=words)}. Most sensitive: {most}."
    return Finding(ev.balance(found), why, tuple(found))


def _between(a: Sequence[Cell], b: Sequence[Cell]) -> Difference | None:
    """log of the ratio of geometric mean KL, layers the sample (pooled variance)."""
    x, y = (np.log([math.exp(np.log(cell.kls).mean()) for cell in cells]) for cells in (a, b))
    df = len(x) + len(y) - 2
    squares = float(((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum())
    error = math.sqrt(squares / df * (1 / len(x) + 1 / len(y)))
    return by_student(float(x.mean() - y.mean()), error, df, len(x) + len(y))
