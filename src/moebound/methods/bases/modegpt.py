"""MoDeGPT's part for MLPs (Lin et al., 2408.09632): fewer hidden channels, and a down projection
that makes up for it: `modegpt_re:b12`.

Nyström, of the second moments C = Σ g² z zᵀ of an expert's hidden values z = silu(G x) · U x
(algorithm 1 of the paper, which has no g):

    J     the p' channels of the largest ridge leverage, diag C (C + λ I)⁻¹, λ = 1 % of C's mean
    kept  G and U of J, and D C_:J (C_JJ + λ I)⁻¹ in the place of D

Stored: which channels (a bit each, in each matrix), and what is kept in the checkpoint's dtype, or
in N-bit entropy-coded whole numbers (`qN`). Other channels decode to 0. Deviations: C is shrunk
towards the layer's, so that experts with few tokens have one; all experts keep the same share
(`kN`, or what bytes allow), where the paper has a share for each layer by how much it changes its
input. Its parts for attention are for attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from moebound.checkpoint import Role
from moebound.codec.arrays import dtype_name
from moebound.codec.fields import FieldReader
from moebound.errors import CorruptionError, MethodError
from moebound.methods.base import Encoding, ExpertView, GroupView, MatrixSpec, Payload
from moebound.methods.bases.approximation import (
    BITS,
    Approximation,
    Option,
    SecondMoments,
    places,
    ranks,
)
from moebound.methods.bases.exact import take_dense, write_dense
from moebound.methods.bases.shared import from_neurons, neurons
from moebound.types import NUMPY_DTYPES, Array, ExpertKey

_RIDGE = 0.01
_TRIES = 6
_HEAD = 4


@dataclass(frozen=True)
class ModeGpt(Approximation):
    """A payload: which neurons, and their rows."""

    id: ClassVar[str] = "modegpt_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"hidden", "tokens"})
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "k": Option("keep", 0, 1, "the share of hidden channels that is kept"),
        "q": Option("coded", 2, 16, "bits of a weight that is kept, 2 to 8 or 16"),
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "k")
    keep: float = -1.0
    coded: int = 16

    def _encode(self, group: GroupView) -> Encoding:
        moments = SecondMoments(group)
        seen = {e.key: moments.of(e.key, "down") for e in group.experts}
        leverage = {key: _leverage(c) for key, c in seen.items() if c is not None}
        if len(leverage) < len(group.experts):
            raise MethodError(
                f"{group.experts[0].key}: no statistics of its hidden values; choose routed "
                "experts only"
            )
        rows = {(e.key, role): neurons(e, role)[0].shape for e, role in places(group)}
        if not self.bits:
            kept = [round(self.keep * len(leverage[e.key])) for e in group.experts]
            return self._at(group, moments, leverage, kept)
        per = [
            sum(rows[e.key, role][1] for role in e.matrices)
            * (self._width(e) if self.coded == 16 else self.coded / 8)
            for e in group.experts
        ]
        fixed = sum(-(-shape[0] // 8) + _HEAD for shape in rows.values())
        room = self.room(group)
        self.refuse_small(group, room, fixed, "frames alone take more")
        caps = [len(leverage[e.key]) for e in group.experts]
        # What is entropy-coded has the bytes that it has: a few are made, and the best is kept.
        factor = 1.0
        tried: list[tuple[float, Encoding]] = []
        for _ in range(1 if self.coded == 16 else _TRIES):
            costs = [cost * factor for cost in per]
            kept = ranks([1.0] * len(costs), caps, costs, room - fixed)
            made = self._at(group, moments, leverage, kept)
            size = _payload_bytes(made)
            tried.append((abs(size - room), made))
            if kept == caps:
                self.refuse_large(group, room - size, max(costs))
            if tried[-1][0] <= 0.003 * room or kept == caps:
                break
            factor *= max(0.1, (size - fixed) / max(1.0, float(np.dot(kept, costs))))
        return min(tried, key=lambda one: one[0])[1]

    @staticmethod
    def _width(expert: ExpertView) -> int:
        return NUMPY_DTYPES[dtype_name(next(iter(expert.matrices.values())).dtype)].itemsize

    def _at(
        self,
        group: GroupView,
        moments: SecondMoments,
        leverage: Mapping[ExpertKey, Array],
        kept: Sequence[int],
    ) -> Encoding:
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for expert, n_kept in zip(group.experts, kept, strict=True):
            order = np.argsort(-leverage[expert.key], kind="stable")[:n_kept]
            own = np.sort(order)
            mask = np.zeros(len(leverage[expert.key]), np.uint8)
            mask[own] = 1
            for role, matrix in expert.matrices.items():
                rows, how = neurons(expert, role)
                some = rows[own]
                if role == "down":
                    c = moments.of(expert.key, role)
                    some = rows[own] if c is None else _made_up(rows, c, own)
                data = bytes([how]) + np.packbits(mask, bitorder="little").tobytes()
                dense = write_dense(some.astype(np.float32), self.coded, dtype_name(matrix.dtype))
                matrices[expert.key][role] = Payload(data + dense)
        return Encoding(matrices)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        how = read.take(1)[0]
        turned, fold = how & 1, how >> 1
        if len(spec.shape) != 2 or how > 5:
            raise CorruptionError(f"neurons of {how} for shape {spec.shape}")
        n, width = spec.shape[::-1] if turned else spec.shape
        if fold:
            n, width = n // 2, width * 2
        mask = np.frombuffer(read.take((n + 7) // 8), np.uint8)
        at = np.flatnonzero(np.unpackbits(mask, count=n, bitorder="little"))
        found = np.zeros((n, width), np.float32)
        found[at] = take_dense(read, (len(at), width))
        return from_neurons(found, how, spec.shape)


def _payload_bytes(made: Encoding) -> int:
    return sum(len(p.data) for roles in made.matrices.values() for p in roles.values())


def _leverage(c: Array) -> Array:
    """diag C (C + λ I)⁻¹ = 1 - λ diag (C + λ I)⁻¹; the mean of C's diagonal is 1."""
    h = torch.from_numpy(c)
    inverse = torch.linalg.inv(h + _RIDGE * torch.eye(len(h), dtype=h.dtype))
    found: Array = 1 - _RIDGE * inverse.diagonal().numpy()
    return found


def _made_up(rows: Array, c: Array, kept: Array) -> Array:
    """rows: of down turned, [p, d] -> [p', d]: (C_JJ + λ I)⁻¹ C_J: Dᵀ."""
    h = torch.from_numpy(c)
    j = torch.from_numpy(kept)
    own = h[j][:, j] + 1e-6 * torch.eye(len(j), dtype=h.dtype)
    found: Array = torch.linalg.solve(own, h[j] @ torch.from_numpy(np.ascontiguousarray(rows)))
    return np.asarray(found)
