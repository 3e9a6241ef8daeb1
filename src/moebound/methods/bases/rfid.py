"""RFID-MoE (Mi et al., 2602.09316): bases for groups of experts, ranks by use and by information:
`rfid_re:b3`. No code is published, and its body was not read: from notes of two readers.

    groups     experts sorted by how many tokens they are sent, cut into groups of 4 (gN)
    score      C_g = ξ E_g + (1 - ξ) F_g, ξ = 0.8 (xN). E_g: the group's share of effective rank,
               R_g = exp(-Σ q ln q), q_k = σ_k² / Σ σ², σ of the group's matrices one above the
               other. F_g: its share of tokens
    ranks      K_g = K_total · C_g / Σ C
    basis      W_e ≈ A_e B_g, A_e [p, K_g], B_g [K_g, d]
    residual   vec(W_e) += P η_e, P sparse, one entry a row, columns of norm 1, drawn from a seed;
               η_e has 3 % (etaN: N, 0 for none) of the weights' number, and its bytes are taken
               from the ranks

The paper fits A and f(Σ α_j B_j) with Adam, as MoBE (`mobe.py`). A group with one basis has nothing
to mix, so α is dropped, and f of a free B is any matrix up to scale: what Adam looks for is the SVD
of the group's matrices one above the other. Fitted is so: SVD, η in closed form (means of what is
left in a bucket), SVD of what η leaves, η again.

Stored: for each projection, the bases of all groups as whole numbers; for each expert A_e with
steps of its own, the number of its group, η_e. Deviations, beside these: K_total is what the bytes
allow, and what flooring leaves is spent, for all projections together; all three projections have
bases, in the model's width (`gu`, as published: down stays as it is). `flat` does without
statistics: groups in the order of the experts, ξ = 1. Randomly drawn buckets take 3 % of what is
left with 3 % of the numbers, so η pays only where it is cheaper than a rank: compare eta0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError
from moebound.methods.base import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Payload,
    SharedPayload,
)
from moebound.methods.bases.approximation import (
    BITS,
    FACTORS,
    Approximation,
    Option,
    one_shape,
    ranks,
    roles_of,
    tokens,
)
from moebound.methods.bases.exact import (
    WIDTHS,
    nothing_left,
    pack_signed,
    signed_bytes,
    take_scaled,
    take_signed,
    write_scaled,
)
from moebound.methods.bases.lowrank import factors, spectrum
from moebound.methods.bases.shared import (
    GATE_UP_ONLY,
    as_is,
    is_turned,
    stays,
    take_as_is,
    take_head,
    upright,
    write_head,
)
from moebound.types import Array, ExpertKey

_SEED = 0x9E3779B97F4A7C15
_HEAD = 9
_ETA_HEAD = 6


@dataclass(frozen=True)
class Rfid(Approximation):
    """A payload: one of a shared basis. Part i: the bases of projection i, one a group."""

    id: ClassVar[str] = "rfid_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"tokens"})
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "f": FACTORS,
        "g": Option("members", 1, 1 << 16, "experts of a group"),
        "x": Option("xi", 0, 1, "how much effective rank counts, beside frequency"),
        "eta": Option("eta", 0, 1, "numbers of the residual, a weight"),
        "gu": GATE_UP_ONLY,
        "flat": Option("flat", means="without statistics"),
    }  # fmt: skip
    members: int = 4
    xi: float = 0.8
    eta: float = 0.03
    gate_up_only: bool = False
    flat: bool = False

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        return frozenset() if self.flat else super().wanted_statistics(shared=shared)

    def n_shared(self, roles: Sequence[Role]) -> int:
        return len(roles)

    def _encode(self, group: GroupView) -> Encoding:
        members = self.grouped(group)
        roles = [role for role in roles_of(group) if not stays(role, self.gate_up_only)]
        seed = (_SEED * (group.layer + 1)) % (1 << 64)
        chosen = self._ranks(group, members, roles)
        parts: list[SharedPayload] = []
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for at, role in enumerate(roles_of(group)):
            head, held = bytearray(), 0
            write_head(head, self.factors, len(members) if role in roles else 0, seed)
            for number, some in enumerate(members if role in roles else []):
                basis, payloads = self._group(some, role, chosen[role, number], number, seed)
                put_varint(head, len(basis))
                put_varint(head, basis.shape[1])
                head += pack_signed(basis, self.factors)
                held += 2 * basis.size
                for expert, data in zip(some, payloads, strict=True):
                    matrices[expert.key][role] = Payload(data, uses=(at,))
            parts.append(SharedPayload(bytes(head), held_bytes=held))
            if role not in roles:
                for expert in group.experts:
                    matrices[expert.key][role] = Payload(as_is(expert, role), uses=(at,))
        return Encoding(matrices, parts)

    def grouped(self, group: GroupView) -> list[list[ExpertView]]:
        """Groups of experts, the most used first."""
        ordered = list(group.experts)
        if self.wanted_statistics(shared=group.experts[0].key.shared):
            count = tokens(group)
            ordered.sort(key=lambda expert: -count[expert.key])
        return [ordered[i : i + self.members] for i in range(0, len(ordered), self.members)]

    def scores(self, group: GroupView, members: list[list[ExpertView]], role: Role) -> list[float]:
        """C of each group."""
        information = np.array([effective_rank(stacked(some, role)) for some in members])
        information /= information.sum()
        if not self.wanted_statistics(shared=group.experts[0].key.shared):
            return [float(share) for share in information]
        count = tokens(group)
        use = np.array([sum(count[e.key] for e in some) for some in members]) / sum(count.values())
        return [float(c) for c in self.xi * information + (1 - self.xi) * use]

    def _ranks(
        self, group: GroupView, members: list[list[ExpertView]], roles: list[Role]
    ) -> dict[tuple[Role, int], int]:
        """K of each group and projection."""
        scores, caps, costs, places = [], [], [], []
        fixed = sum(len(as_is(e, r)) for e in group.experts for r in e.matrices if r not in roles)
        for role in roles:
            p, d = self._size(group, role)
            n_eta = round(self.eta * p * d)
            for number, (some, score) in enumerate(
                zip(members, self.scores(group, members, role), strict=True)
            ):
                places.append((role, number))
                scores.append(score)
                caps.append(min(len(some) * p, d))
                costs.append(self.factors * (len(some) * p + d) / 8 + len(some))
                head = _HEAD + _ETA_HEAD * bool(n_eta)
                fixed += len(some) * (head + signed_bytes(n_eta, self.factors)) + 4
        parts = len(roles_of(group))
        room = self.room(group, uses=1, parts=parts) - 12 * parts
        what = "the residual and what stays take more" if self.eta else "frames alone take more"
        self.refuse_small(group, room, fixed, what)
        found = ranks(scores, caps, costs, room - fixed)
        self.refuse_large(group, room - fixed - float(np.dot(found, costs)), max(costs))
        return dict(zip(places, found, strict=True))

    @staticmethod
    def _size(group: GroupView, role: Role) -> tuple[int, int]:
        """p, d: of an expert's matrix with the model's width along its rows."""
        one_shape(group, role)
        p, d = upright(group.experts[0], role).shape
        return p, d

    def _group(
        self, some: list[ExpertView], role: Role, rank: int, number: int, seed: int
    ) -> tuple[Array, list[bytes]]:
        """Whole numbers of the basis [K, d], and the payloads of the experts."""
        whole = stacked(some, role)
        p, d = len(whole) // len(some), whole.shape[1]
        n_eta = round(self.eta * p * d)
        taken = buckets(seed, p * d, n_eta) if n_eta else None
        means = np.zeros((len(some), n_eta))
        top = (1 << (self.factors - 1)) - 1
        for _ in range(2 if n_eta else 1):
            rest = whole
            if taken is not None:
                rest = whole - means[:, taken].reshape(whole.shape)
            left, right, _ = factors(rest)
            left, right = left[:, :rank], right[:rank]
            step = np.abs(right).max(axis=1, initial=0.0) / top
            step = np.where(step > 0, step, 1.0)
            basis = np.rint(right / step[:, None])
            codes = [
                write_scaled(left[e * p : (e + 1) * p] * step, self.factors)
                for e in range(len(some))
            ]
            if taken is not None:
                near = np.concatenate([_near(code, p, rank, self.factors, basis) for code in codes])
                means = bucket_means(whole - near, len(some), taken, n_eta)
        turned = [is_turned(expert, role) for expert in some]
        payloads = []
        for e, code in enumerate(codes):
            out = bytearray([1, int(turned[e]), self.factors])
            put_varint(out, number)
            out += code
            put_varint(out, n_eta)
            if n_eta:
                eta_step = np.float32(np.abs(means[e]).max() / top) or np.float32(1)
                out += eta_step.astype("<f4").tobytes()
                eta = np.rint(means[e] / np.float64(eta_step)).clip(-top, top)
                out += pack_signed(eta, self.factors)
            payloads.append(bytes(out))
        return basis, payloads

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        """seed, and for each group [K, d] of whole numbers."""
        read = FieldReader(payload, 0)
        bits, n_groups, seed = take_head(read)
        bases = []
        for _ in range(n_groups):
            shape = read.varint(), read.varint()
            bases.append(take_signed(read, shape, bits))
        nothing_left(read)
        return seed, bases

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        kind, *_ = read.take(1)
        if kind == 0:
            return take_as_is(read, spec)
        turned, bits = read.take(2)
        number = read.varint()
        if kind != 1 or turned > 1 or len(shared) != 1 or number >= len(shared[0][1]):
            raise CorruptionError(f"kind {kind}, group {number}")
        seed, bases = shared[0]
        basis = bases[number]
        rows, cols = spec.shape[::-1] if turned else spec.shape
        if basis.shape[1] != cols or bits not in WIDTHS:
            raise CorruptionError(f"a basis of width {basis.shape[1]}, expected {cols}")
        unit, left = take_scaled(read, rows, len(basis), bits)
        found = (left @ basis.astype(np.float64)) * unit
        n_eta = read.varint()
        if n_eta:
            if n_eta > rows * cols:
                raise CorruptionError(f"{n_eta} numbers of a residual of {rows * cols} weights")
            step = np.float64(np.frombuffer(read.take(4), "<f4")[0])
            eta = take_signed(read, (n_eta,), bits) * step
            found += eta[buckets(seed, rows * cols, n_eta)].reshape(rows, cols)
        nothing_left(read)
        weights = found.astype(np.float32)
        return np.ascontiguousarray(weights.T) if turned else weights


def stacked(some: Sequence[ExpertView], role: Role) -> Array:
    """[members · p, d] float64, one above the other."""
    return np.concatenate([upright(expert, role) for expert in some])


def effective_rank(matrix: Array) -> float:
    """exp(-Σ q ln q), q the shares of σ²."""
    energy = spectrum(matrix)
    share = energy[energy > 0] / max(float(energy.sum()), 1e-300)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 1.0


def buckets(seed: int, n: int, n_buckets: int) -> Array:
    """[n] below n_buckets: splitmix64 of seed + i, modulo n_buckets."""
    with np.errstate(over="ignore"):
        z = np.arange(n, dtype=np.uint64) + np.uint64(seed)
        z *= np.uint64(_SEED)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(n_buckets)).astype(np.int64)


def bucket_means(rest: Array, n_experts: int, taken: Array, n_buckets: int) -> Array:
    """[n_experts, n_buckets]: least squares for η over the square root of its count."""
    count = np.maximum(np.bincount(taken, minlength=n_buckets), 1)
    sums = [
        np.bincount(taken, weights=own.reshape(-1), minlength=n_buckets)
        for own in np.split(rest, n_experts)
    ]
    means: Array = np.array(sums) / count
    return means


def _near(code: bytes, rows: int, rank: int, bits: int, basis: Array) -> Array:
    unit, left = take_scaled(FieldReader(memoryview(code), 0), rows, rank, bits)
    found: Array = (left @ basis) * unit
    return found
