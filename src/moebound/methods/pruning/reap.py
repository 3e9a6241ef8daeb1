"""REAP, router-weighted expert activation pruning (2510.13999, section 3): `reap_re:keep6`.

    S_e = 1/T_e · sum over the T_e tokens sent to e of g_e(x) · |f_e(x)|

with g the weight that the model really multiplies by (renormalised over the chosen experts where it
does so) and |·| the Euclidean norm of the expert's output before it. The lowest S_e of each layer
are left out, the same number in each. An expert without tokens has S_e = 0.

From the statistics `norms` (sum of g |f|) and `sent` (T_e). What is stored: `pruned.py`.

Reimplemented (`_re`). Deviations: no exception for "super experts"; the calibration text is the
user's, where the paper's is code (evol-codealpaca, 1,024 sequences); of equal scores the first is
kept, where the released code leaves it to `torch.topk`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moebound.methods.base import GroupView
from moebound.methods.keeping import column
from moebound.methods.pruning.pruned import Pruned
from moebound.types import Array


class Reap(Pruned):
    id: ClassVar[str] = "reap_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"sent", "norms"})

    def scores(self, group: GroupView) -> Array:
        found: Array = column(group, "norms") / np.maximum(column(group, "sent"), 1)
        return found
