"""After SoCo (Li et al., 2502.15092): which singular components are worth their bytes:
`soco_lite:b3`.

SoCo writes W' = U (Σ · s) Vᵀ and learns s end to end, in three phases, with a loss that counts
size. Here the loss is what the layer's matrices put out on the calibration text, Σ tr(E H Eᵀ), E =
W - W'. As U is orthonormal, that is

    Σ_k (1 - s_k)² σ_k² v_kᵀ H v_k

so no scale looks at another: s_k is 1 where component k is kept, and those are kept whose
σ_k² v_kᵀ H v_k is the largest a byte, of all matrices of a layer together. The optimum is written
down, not searched. Each role's gains are shares of what its matrices put out, as errors before and
behind the activation have no common unit.

Stored: as svd.py. Inspired by the paper, no more: its loss sees the whole model, its s differ from
0 and 1, and it trains a bias, with a schedule that is not published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.methods.base import ExpertView, GroupView
from moebound.methods.bases.approximation import (
    SecondMoments,
    is_transposed,
    weights,
)
from moebound.methods.bases.exact import write_product
from moebound.methods.bases.lowrank import factors
from moebound.methods.bases.svd import LowRank, Place
from moebound.types import Array


@dataclass(frozen=True)
class SoCoLite(LowRank):
    id: ClassVar[str] = "soco_lite"
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden", "tokens"})

    def chosen_ranks(
        self, group: GroupView, kept: Sequence[tuple[ExpertView, Role]]
    ) -> Mapping[Place, int]:
        moments = SecondMoments(group)
        found = {(e.key, role): self._components(e, role, moments)[2] for e, role in kept}
        whole: dict[Role, float] = {}
        for (_, role), gains in found.items():
            whole[role] = whole.get(role, 0.0) + float(gains.sum())
        return self.by_energy(
            group, kept, lambda e, role: found[e.key, role] / max(whole[role], 1e-300)
        )

    def maker(self, group: GroupView) -> Callable[[ExpertView, Role, int], bytes]:
        moments = SecondMoments(group)  # reads the layer's, once for all of its matrices

        def make(expert: ExpertView, role: Role, rank: int) -> bytes:
            left, right, _ = self._components(expert, role, moments)
            left, right = left[:, :rank], right[:rank]
            if is_transposed(expert, role, moments.n_inputs(role)):
                left, right = right.T, left.T
            return write_product(left, right, self.factors)

        return make

    def _components(
        self, expert: ExpertView, role: Role, moments: SecondMoments
    ) -> tuple[Array, Array, Array]:
        """left, right and gains, the largest gain first."""
        w = weights(expert, role, n_inputs=moments.n_inputs(role))
        left, right, _ = factors(w)
        h = moments.total(expert.key, role)
        gains = (left**2).sum(axis=0)
        gains = gains * np.einsum("kj,kj->k", right if h is None else right @ h, right)
        order = np.argsort(-gains, kind="stable")
        return left[:, order], right[order], gains[order]
