"""D2-MoE (Gu et al., 2502.17298): a base for all experts, and low-rank differences from it:
`d2_moe_fixed:b3`.

    W_b = Σ cnt_e W_e / Σ cnt_e                 section 3.2, with F = 1
    Δ_e = W_e - W_b ≈ U_k U_kᵀ Δ_e              section 3.3: SVD of Δ_e S, S Sᵀ = H, times S⁻¹

H are the second moments of the expert's inputs, weighted by g² as `moebound calibrate` gathers them
(the paper's are not weighted), and shrunk towards those of the layer. U are eigenvectors of
Δ H Δᵀ, which is the same approximation without an inverse (`lowrank.py`).

Stored: for each projection W_b, whole, in the checkpoint's dtype (`baseN`: in N-bit entropy-coded
whole numbers), and for each expert a product (`exact.py`). Repaired, of the released code: S is
kept in bfloat16 and then inverted; experts without tokens crash it; its base is pruned by columns
that differ from batch to batch, so that it has to be kept whole while it is counted as pruned.
Deviations: F = 1 (the Fisher weights need a backward pass), ranks are equal but for what flooring
leaves, no V that experts share. `plain` does without statistics: the mean, and no H.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.fields import FieldReader
from moebound.methods.base import Encoding, GroupView, MatrixSpec, Payload, SharedPayload
from moebound.methods.bases.approximation import (
    BITS,
    FACTORS,
    RANK,
    Approximation,
    Option,
    SecondMoments,
    as_stored,
    is_transposed,
    mean_part,
    places,
    ranks,
    roles_of,
    tokens,
)
from moebound.methods.bases.exact import (
    nothing_left,
    one_dense,
    open_dense,
    per_rank,
    take_product,
    write_product,
)
from moebound.methods.bases.lowrank import factors
from moebound.types import Array, ExpertKey

BASE = Option("base", 2, 16, "bits of a weight of the base, 2 to 8 or 16")
PLAIN = Option("plain", means="without statistics")
_HEAD = 7


@dataclass(frozen=True)
class D2Moe(Approximation):
    """A payload: one product. Part i: the base of projection i."""

    id: ClassVar[str] = "d2_moe_fixed"
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden", "tokens"})
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "r": RANK, "f": FACTORS, "base": BASE, "plain": PLAIN,
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "r")
    rank: int = -1
    base: int = 16
    plain: bool = False

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        return frozenset() if self.plain else super().wanted_statistics(shared=shared)

    def n_shared(self, roles: Sequence[Role]) -> int:
        return len(roles)

    def _encode(self, group: GroupView) -> Encoding:
        roles = roles_of(group)
        if self.plain:
            group = GroupView(group.experts)
        count, moments = tokens(group), SecondMoments(group)
        parts = [mean_part(group, role, count, self.base) for role in roles]
        bases = [self.open_shared(memoryview(part.data)) for part in parts]
        found = self._ranks(group, parts)
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for (expert, role), rank in zip(places(group), found, strict=True):
            at = roles.index(role)
            delta = as_stored(expert, role) - bases[at].astype(np.float64)
            turned = is_transposed(expert, role, moments.n_inputs(role))
            h = moments.of(expert.key, role)
            left, right, _ = factors(delta.T if turned else delta, h)
            left, right = left[:, :rank], right[:rank]
            if turned:
                left, right = right.T, left.T
            data = write_product(left, right, self.factors)
            matrices[expert.key][role] = Payload(data, uses=(at,))
        return Encoding(matrices, parts)

    def _ranks(self, group: GroupView, parts: Sequence[SharedPayload]) -> list[int]:
        shapes = [expert.matrices[role].shape for expert, role in places(group)]
        if not self.bits:
            return [min(self.rank, *shape) for shape in shapes]
        costs = [per_rank(shape, self.factors) for shape in shapes]
        fixed = sum(len(part.data) for part in parts) + _HEAD * len(shapes)
        room = self.room(group, uses=1, parts=len(parts))
        self.refuse_small(group, room, fixed, "the base alone takes more")
        found = ranks([1.0] * len(shapes), list(map(min, shapes)), costs, room - fixed)
        self.refuse_large(group, room - fixed - float(np.dot(found, costs)), max(costs))
        return found

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        return open_dense(payload)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        base = one_dense(shared, spec.shape)
        read = FieldReader(payload, 0)
        found = take_product(read, spec.shape)
        nothing_left(read)
        found += base
        return found.astype(np.float32)
