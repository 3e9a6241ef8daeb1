"""MoE-I² (Yang et al., 2411.01016): few experts, and ranks by importance: `moe_i2_re:b3`.

Its second stage (section 3.3; the formula is of a reimplementation): experts at the ranks

    R_e = (I_e + ε)^0.15 / Σ (I + ε)^0.15 · R_a · n        a plain SVD of each matrix

and, with `pN`, its first in short: that share of experts, the least important ones of the layer, is
never chosen again (`router_edit.py`), and nothing of them is stored.

Stored: as svd.py, and the experts that are kept. Deviations, so that it is "(no recovery)": I_e is
Σ |g f(x)|² over the calibration text, where the paper takes the loss without the expert (n · L
evaluations). The same share of every layer is pruned, by I_e, without its genetic search. What
flooring the ranks leaves is spent. No LoRA afterwards: the paper's headline figures have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.methods.base import ExpertView, GroupView
from moebound.methods.bases.approximation import BITS, FACTORS, RANK, Option
from moebound.methods.bases.svd import LowRank, Place
from moebound.methods.router_edit import RouterEdit
from moebound.types import ExpertKey


@dataclass(frozen=True)
class MoeI2(LowRank):
    """rank: the mean. pruned: share of experts."""

    id: ClassVar[str] = "moe_i2_re"
    edits_router: ClassVar[bool] = True
    statistics: ClassVar[frozenset[str]] = frozenset({"outputs"})
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "r": RANK._replace(means="the mean rank"), "f": FACTORS,
        "p": Option("pruned", 0, 0.95, "the share of experts that is never chosen again"),
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "r")
    rank: int = -1
    pruned: float = 0.0

    def importance(self, group: GroupView) -> dict[ExpertKey, float]:
        """Σ |g f(x)|² of each expert, next to the layer's mean."""
        outputs = group.statistics.get("outputs", {})
        own = {e.key: float(np.sum(outputs[e.key][1])) if outputs else 0.0 for e in group.experts}
        mean = sum(own.values()) / len(own)
        return {key: value / mean if mean > 0 else 1.0 for key, value in own.items()}

    def edit(self, group: GroupView) -> RouterEdit | None:
        drop = int(self.pruned * len(group.experts))
        if not drop:
            return None
        importance = self.importance(group)
        ordered = sorted(importance, key=lambda key: (importance[key], key))
        return RouterEdit(group.layer, keep=tuple(sorted(key.expert for key in ordered[drop:])))

    def chosen_ranks(
        self, group: GroupView, kept: Sequence[tuple[ExpertView, Role]]
    ) -> Mapping[Place, int]:
        importance = self.importance(group)
        return self.by_score(group, kept, self.rank, lambda key: (importance[key] + 1e-6) ** 0.15)
