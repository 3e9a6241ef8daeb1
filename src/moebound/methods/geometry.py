"""What the second moments of a matrix's inputs say of its columns: order, steps, and a promise.

H' = (H + what shrinkage added) / mean + damping, in the order of rounding, is M Mᵀ with M upper
triangular (`feedback.py`). Steps go in proportion to 1/M_jj (WaterSIC, 2603.04956), so that every
column of the error e = (W - Ŵ) M is spread alike.

The promise for outputs. mean · H' - H is positive semidefinite: shrinkage and damping add what is.
So

    tr((W - Ŵ) H (W - Ŵ)ᵀ) <= mean · |(W - Ŵ) M|² = mean · Σ_ij e_ij²

  lattice   A weight that goes to the point nearest to its target has |e_ij| <= Δ_j M_jj / 2, for
            e_ij is M_jj times its distance from that target. If all do, a row's share is at most
            Σ_j (Δ_j M_jj / 2)². Where the clamp or the cast keeps a weight from that point, its
            e_ij may be larger. Few are, and the mean square of the others is a third of the
            largest, so the sum stays below all the same; but that is found, not proved.
  box       |W - Ŵ|_ij <= ε_j, which holds for every weight and after the cast, is enough for a
            row's share of Σ_jk ε_j |H_jk| ε_k at most: |E_ij H_jk E_ik| <= ε_j |H_jk| ε_k. True
            whatever was clamped, and up to N times wider than needed.

So the lattice's is what is promised where the measured error is within it, else the box's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moebound.methods.shrinkage import RULE
from moebound.types import Array

OCTAVE = 4
"""Steps are base · 2^(k/4)."""
WIDEST = 8 * OCTAVE
"""Steps of a matrix differ by at most eight octaves; columns beyond get less than they could."""


def row_levels(weights: Array) -> tuple[Array, float]:
    """Levels [rows], counted down from a factor of 1, of factors in proportion to weights^(-1/2),
    and log2 of what level 0 stands for. weights: [rows], Fisher's, above 0."""
    logs = -0.5 * np.log2(weights)
    levels = np.rint((logs.max() - logs) * OCTAVE).clip(0, WIDEST)
    return levels.astype(np.uint8), float((logs + levels / OCTAVE).mean())


@dataclass(frozen=True, eq=False)
class Geometry:
    """What H says of the columns. order: [N], in which they are rounded. upper: M of `feedback`, in
    that order, torch float64. levels: [N] integers, log2 of each step in quarters of an octave, the
    smallest 0. mean: of H's diagonal, what H' was divided by."""

    order: Array
    upper: Any
    levels: Array
    mean: float

    @classmethod
    def of(cls, moments: Array, damping: float = RULE.least_damping) -> Geometry:
        """moments: H [N, N], or its diagonal [N]."""
        import torch

        from moebound.methods.feedback import damped, upper_factor

        given = torch.from_numpy(np.ascontiguousarray(moments, np.float64))
        h = damped(given.diag() if given.dim() == 1 else given, damping)
        order = h.diagonal().argsort(descending=True, stable=True)
        upper = upper_factor(h[order][:, order])
        logs = torch.empty(len(h), dtype=torch.float64)
        logs[order] = -upper.diagonal().log2()
        levels = (logs * OCTAVE).round().long().numpy()
        levels = levels - levels.min()
        mean = float(given.mean() if given.dim() == 1 else given.diagonal().mean())
        return cls(order.numpy(), upper, np.minimum(levels, WIDEST), mean)

    @property
    def widest(self) -> float:
        """log2 of the step of level 0, counted down from the widest, where the product of each step
        and M_jj is 1 on average over the logarithms, in units of H' itself."""
        own = np.empty(len(self.levels))
        own[self.order] = -np.log2(self.upper.diagonal().numpy())
        return float((own - (self.levels - self.levels.max()) / OCTAVE).mean())

    @property
    def bits(self) -> int:
        """Of each level."""
        return int(self.levels.max()).bit_length()

    def lattice(self, steps: Array, rows: float) -> float:
        """What the outputs' error is at most if every column goes to its nearest point, over `rows`
        rows; where rows have factors, the sum of their squares. steps: [N]."""
        ends = steps[self.order] * self.upper.diagonal().numpy() / 2
        return self.mean * rows * float(np.square(ends).sum())
