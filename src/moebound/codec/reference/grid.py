"""4.3: the grid. Which value stands for which weights, so that the bound holds after the cast.

Going up from 0, each cell's value is the largest output number whose reach of ε downwards still
touches the first source number not covered yet; the cell then ends where ε upwards does. Nothing
falls between two cells, and no covering whose first value is 0 has fewer: by induction on m, no
other m cells get further than these. Negative numbers mirror positive ones.

Distances are float64 differences, the rule that certificates are measured by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.formats import FORMATS, NumberFormat, Patterns
from moebound.types import DType

MAX_CELLS = 1 << 15
"""Cells of one sign that the encoder uses: |bin| < 2^15."""

NO_BIN = np.iinfo(np.int64).min
"""Stands for the bin of a weight that no cell covers, a NaN or an infinity too."""


@dataclass(frozen=True)
class Grid:
    """Cells of non-negative numbers. Cell m covers source patterns edges[m-1] + 1 .. edges[m].

    values: the pattern each cell decodes to, in the output dtype; values[0] = 0.
    edges: the largest source pattern of each cell.
    """

    values: list[int]
    edges: list[int]


def make_grid(
    source: DType, output: DType, bound: float, n_cells: int, up_to: int | None = None
) -> Grid:
    """The first n_cells cells; fewer where the numbers end, or once source pattern up_to is in.

    Fewer too where the output's spacing grows beyond 2ε, so that it can follow no further.
    """
    S, T = FORMATS[source], FORMATS[output]
    last = S.largest if up_to is None else min(up_to, S.largest)
    values, edges = [0], [_reach(S, 0.0, bound, at_least=0)]
    while len(values) < n_cells and edges[-1] < last:
        uncovered = S.value(edges[-1] + 1)
        value = _reach(T, uncovered, bound, at_least=values[-1])
        middle = T.value(value)
        if value == values[-1] or not uncovered - middle <= bound:
            break
        values.append(value)
        edges.append(_reach(S, middle, bound, at_least=edges[-1] + 1))
    return Grid(values, edges)


def bins_of(patterns: Patterns, source: DType, grid: Grid) -> npt.NDArray[np.int64]:
    """The bin of every source pattern: m or -m for cell m, NO_BIN outside the grid."""
    S = FORMATS[source]
    signed = patterns.astype(np.int64)
    magnitude = signed & ~np.int64(S.sign)
    cell = np.searchsorted(grid.edges, magnitude)  # the first edge that is not below
    inside = (cell < len(grid.edges)) & (magnitude <= S.largest)
    bins = np.where(signed & S.sign, -cell, cell)
    return np.where(inside, bins, NO_BIN)


def _reach(numbers: NumberFormat, start: float, bound: float, *, at_least: int) -> int:
    """The largest finite pattern x, not below at_least, with x - start <= bound.

    at_least itself if there is none. The difference grows with x, rounded or not: strides that
    double while they stay within, then halve.
    """
    found, stride = at_least, 1
    growing = True
    while stride:
        further = found + stride
        if further <= numbers.largest and numbers.value(further) - start <= bound:
            found = further
        else:
            growing = False
        stride = stride * 2 if growing else stride // 2
    return found
