"""Sub-MoE, merging in a common subspace (2506.23266): `sub_moe_re:keep4:rank128`.

Clusters by k-means on the cosine of experts' mean outputs. Of each matrix of a cluster, the
members' [out, in] side by side are decomposed together, and their right factors mixed by share of
tokens:

    [W_1 ... W_c] = U S [V_1 ... V_c],      W = U_r S_r · sum_e share_e V_e,r

U_r, S_r, V_r are the first r directions (`rank`). Since U_r S_r V_e,r = U_r U_rᵀ W_e, this is U_r
U_rᵀ times the weighted mean, and is computed so, with U from the eigenvectors of sum_e W_e W_eᵀ.
Without `rank` nothing is cut off, and the result is the weighted mean itself, exactly: the
subspace matters only where it is truncated. From the statistics `plain`, `tokens` and `sent`. What
is stored: `merged.py`; the merged matrix is stored whole.

Reimplemented (`_re`) from the abstract, since the paper's own code was not read. Deviations: the
same number of clusters in each layer (the paper pools two layers'); the rank is the user's, for
the paper's is not known; clusters are found from mean outputs, not from outputs token by token;
one matrix of gate and up, where a checkpoint keeps them so, is decomposed as one. REAP's release
has a "Sub-MoE" that reshapes V without a transpose, and so mixes up the experts' columns: its
figures are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from moebound.errors import MethodError
from moebound.methods.base import GroupView
from moebound.methods.merging.merged import Merged, k_means, mean_outputs, unit
from moebound.methods.one_thread import one_thread
from moebound.types import Array


class SubMoe(Merged):
    id: ClassVar[str] = "sub_moe_re"
    known: ClassVar[str] = "rank[1-9][0-9]{0,5}"
    statistics: ClassVar[frozenset[str]] = frozenset({"sent", "tokens", "plain"})

    def clusters(self, group: GroupView, n: int) -> list[list[int]]:
        return k_means(unit(mean_outputs(group)), n)

    def mixed(self, weights: Sequence[Array], share: Array) -> Array:
        mean, asked = super().mixed(weights, share), self.flag("rank")
        if asked is None:
            return mean
        rank, n_rows = int(asked), len(mean)
        if rank > n_rows:
            raise MethodError(f"rank{rank}: a matrix has {n_rows} outputs; {n_rows} is all of it")
        import torch

        with one_thread():
            gram = torch.zeros(n_rows, n_rows, dtype=torch.float64)
            for matrix in weights:
                own = torch.from_numpy(np.ascontiguousarray(matrix, np.float64))
                gram.addmm_(own, own.T)
            u = torch.linalg.eigh(gram).eigenvectors[:, n_rows - rank :]
            found: Array = (u @ (u.T @ torch.from_numpy(mean))).numpy()
        return found
