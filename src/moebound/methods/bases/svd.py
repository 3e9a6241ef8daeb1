"""Each matrix by itself, at low rank: `svd:b3`, the baseline of every shared form.

Ŵ = U_r S_r V_rᵀ (Eckart and Young, 1936), every matrix at one rank. With `energy`, the largest
singular values of the layer are kept, byte for byte, whichever matrix they are of.

Stored: a sum of rank-1 matrices in 16-bit (fN: N-bit) whole numbers (`exact.py`), where papers keep
bfloat16: the same bytes, but for one byte a rank. `LowRank` is what moe_i2.py and soco.py share
with it: they choose other ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.fields import FieldReader
from moebound.errors import MethodError
from moebound.methods.base import Encoding, ExpertView, GroupView, MatrixSpec, Payload
from moebound.methods.bases.approximation import (
    BITS,
    FACTORS,
    RANK,
    Approximation,
    Option,
    as_stored,
    places,
    ranks,
)
from moebound.methods.bases.exact import nothing_left, per_rank, take_product, write_product
from moebound.methods.bases.lowrank import factors, spectrum
from moebound.methods.router_edit import RouterEdit
from moebound.types import Array, ExpertKey

_HEAD = 7
"""Bytes of a payload beside what grows with the rank."""
Place = tuple[ExpertKey, Role]


@dataclass(frozen=True)
class LowRank(Approximation):
    """A payload: one product (docs/format-method.md, section 9)."""

    def _encode(self, group: GroupView) -> Encoding:
        edit = self.edit(group)
        kept = [(e, role) for e, role in places(group) if _chosen(e.key, edit)]
        found = self.chosen_ranks(group, kept)
        make = self.maker(group)
        data = {(e.key, role): make(e, role, found[e.key, role]) for e, role in kept}
        nothing = write_product(np.zeros((0, 0)), np.zeros((0, 0)), self.factors)
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for expert, role in places(group):
            matrices[expert.key][role] = Payload(data.get((expert.key, role), nothing))
        return Encoding(matrices, router=edit)

    def edit(self, group: GroupView) -> RouterEdit | None:
        """What becomes of the routing: nothing."""
        return None

    @abstractmethod
    def chosen_ranks(
        self, group: GroupView, kept: Sequence[tuple[ExpertView, Role]]
    ) -> Mapping[Place, int]:
        """The rank of every matrix that is kept."""

    def maker(self, group: GroupView) -> Callable[[ExpertView, Role, int], bytes]:
        """What makes the payload of a matrix at a rank."""

        def make(expert: ExpertView, role: Role, rank: int) -> bytes:
            left, right, _ = factors(as_stored(expert, role))
            return write_product(left[:, :rank], right[:rank], self.factors)

        return make

    def by_score(
        self,
        group: GroupView,
        kept: Sequence[tuple[ExpertView, Role]],
        rank: int,
        score: Callable[[ExpertKey], float],
    ) -> dict[Place, int]:
        """Ranks in proportion to a score of their expert, for `bits` or for a mean rank."""
        shapes = [expert.matrices[role].shape for expert, role in kept]
        caps, costs = list(map(min, shapes)), [per_rank(s, self.factors) for s in shapes]
        budget = self.payload_bytes(group) if self.bits else rank * sum(costs)
        found = ranks([score(expert.key) for expert, _ in kept], caps, costs, budget)
        if self.bits:
            left = budget - sum(np.multiply(found, costs))
            self.refuse_large(group, float(left), max(costs))
        return {(e.key, role): r for (e, role), r in zip(kept, found, strict=True)}

    def payload_bytes(self, group: GroupView) -> float:
        """For what grows with the ranks. Raises MethodError where there is none."""
        room = self.room(group) - sum(_HEAD for _ in places(group))
        self.refuse_small(group, room, 0, "frames alone take more")
        return room

    def by_energy(
        self,
        group: GroupView,
        kept: Sequence[tuple[ExpertView, Role]],
        energy: Callable[[ExpertView, Role], Array],
    ) -> dict[Place, int]:
        """The largest energies a byte, of all matrices together, for `bits`."""
        if not self.bits:
            raise MethodError(f"method {self.setting!r}: what is chosen by energy is sized by bN")
        costs = [per_rank(e.matrices[role].shape, self.factors) for e, role in kept]
        gains = [energy(e, role) / cost for (e, role), cost in zip(kept, costs, strict=True)]
        owner = np.repeat(np.arange(len(kept)), [len(g) for g in gains])
        order = np.argsort(-np.concatenate(gains), kind="stable")
        budget = self.payload_bytes(group)
        spent = np.cumsum(np.take(costs, owner[order]))
        chosen = order[: int(np.searchsorted(spent, budget, side="right"))]
        self.refuse_large(group, budget - float(spent[-1]), max(costs))
        counts = np.bincount(owner[chosen], minlength=len(kept))
        return {(e.key, role): int(n) for (e, role), n in zip(kept, counts, strict=True)}

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        found = take_product(read, spec.shape).astype(np.float32)
        nothing_left(read)
        return found


def _chosen(key: ExpertKey, edit: RouterEdit | None) -> bool:
    return edit is None or edit.keep is None or key.expert in edit.keep


@dataclass(frozen=True)
class Svd(LowRank):
    """rank: of every matrix. energy: whether the layer's singular values are weighed together."""

    id: ClassVar[str] = "svd"
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "r": RANK, "f": FACTORS,
        "energy": Option("energy", means="the layer's largest singular values"),
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "r")
    rank: int = -1
    energy: bool = False

    def chosen_ranks(
        self, group: GroupView, kept: Sequence[tuple[ExpertView, Role]]
    ) -> Mapping[Place, int]:
        if self.energy:
            return self.by_energy(group, kept, lambda e, role: spectrum(as_stored(e, role)))
        if not self.bits:
            return {(e.key, role): min(self.rank, *e.matrices[role].shape) for e, role in kept}
        return self.by_score(group, kept, self.rank, lambda _: 1.0)
