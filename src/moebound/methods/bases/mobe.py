"""MoBE (Chen et al., 2508.05257): experts as mixtures of bases that a layer shares:
`mobe_fixed:b3`.

    W_e ≈ A_e f(Σ_j α_ej B_j)        A_e [p, r], B_j [r, d], α_e on the simplex (equation 4)

for gate and up, f tanh (SiLU: `silu`), of W over its standard deviation. A, B and the logits of α
are fitted to the weights with Adam on the mean square error, full batch; no data. It begins with
the SVD of the experts of n/m consecutive ones, one above the other, and with α nearly one-hot.

Stored: for each projection m bases as whole numbers (one part); for each expert α as 16-bit whole
numbers, A_e with steps of its own. The mixture is an exact sum, f is computed by `exact.apply`, its
values are rounded to 16 bits, and the product is an exact sum again.

Repaired, of the released code: α starts at logits of which a softmax is one-hot (its ones are not);
n need not be a multiple of m; the best state is kept from the first step on, not from the 200th;
every group is trained. Deviations: 400 steps (sN; the paper trains 10,000 to 30,000) at a rate that
falls from 0.07 to 0, from B of a size at which f bends; then every A_e is the least squares
solution for the rounded f; bases number n/4 (mN), r is what the bytes allow (the paper: r = p, and
m decides); all three projections have bases, down's turned so that they lie along the model's width
(`gu`, as published: down stays as it is).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from moebound.checkpoint import Role
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError
from moebound.methods.base import Encoding, GroupView, MatrixSpec, Payload, SharedPayload
from moebound.methods.bases.approximation import (
    BITS,
    FACTORS,
    RANK,
    Approximation,
    Option,
    one_shape,
    ranks,
    roles_of,
)
from moebound.methods.bases.exact import (
    WIDTHS,
    Function,
    apply,
    limit,
    nothing_left,
    pack_signed,
    rounded,
    take_powers,
    take_scaled,
    take_signed,
    write_powers,
    write_scaled,
)
from moebound.methods.bases.lowrank import factors
from moebound.methods.bases.shared import (
    GATE_UP_ONLY,
    as_is,
    is_turned,
    stays,
    take_as_is,
    upright,
)
from moebound.types import Array, ExpertKey

_FUNCTIONS: tuple[Function, ...] = ("tanh", "silu")
_ALPHA = 32767
_HEAD = 8
_OWN_SHARE = 0.95
"""Of α at the start: what the expert's own basis has."""
_SCALE = 0.7
"""Root mean square of B at the start, where f begins to bend."""
RATE = 0.07
_AT_ONCE = 1 << 24
"""Values that experts have together, of those that are looked at at once."""
MAX_BASES = 1 << 12


@dataclass(frozen=True)
class Mobe(Approximation):
    """A payload: α and A. Part i: the bases of projection i."""

    id: ClassVar[str] = "mobe_fixed"
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "r": RANK, "f": FACTORS,
        "m": Option("bases", 1, MAX_BASES, "bases of a layer and projection"),
        "s": Option("steps", 0, 1_000_000, "steps of Adam"),
        "silu": Option("silu", means="SiLU in the place of tanh"),
        "gu": GATE_UP_ONLY,
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "r")
    rank: int = -1
    bases: int = 0
    steps: int = 400
    silu: bool = False
    gate_up_only: bool = False

    def n_shared(self, roles: Sequence[Role]) -> int:
        return len(roles)

    def _encode(self, group: GroupView) -> Encoding:
        n = len(group.experts)
        m = min(n, self.bases or max(1, n // 4))
        every = roles_of(group)
        roles = [role for role in every if not stays(role, self.gate_up_only)]
        chosen = self._ranks(group, roles, m)
        function = _FUNCTIONS[int(self.silu)]
        parts: list[SharedPayload] = []
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for at, role in enumerate(every):
            if role not in roles:
                parts.append(SharedPayload(_part(0, np.zeros((0, 0, 0)), 16), 0))
                for expert in group.experts:
                    matrices[expert.key][role] = Payload(as_is(expert, role), uses=(at,))
                continue
            each = chosen[role]
            target = np.stack([upright(e, role) for e in group.experts]).astype(np.float32)
            b, alpha = fit(target, m, max(each), function, self.steps)
            part = _part(_FUNCTIONS.index(function), b, self.factors)
            parts.append(SharedPayload(part, held_bytes=2 * b.size))
            opened = self.open_shared(memoryview(part))
            for e, expert in enumerate(group.experts):
                whole = np.rint(alpha[e] * _ALPHA).astype(np.int64)
                mixed = opened.mixture(whole)
                basis = mixed.codes[: each[e]]
                left = _least_squares(target[e].astype(np.float64), basis)
                out = bytearray([1, int(is_turned(expert, role)), self.factors])
                out += pack_signed(whole, 16)
                put_varint(out, each[e])
                out += write_scaled(left, self.factors)
                matrices[expert.key][role] = Payload(bytes(out), uses=(at,))
        return Encoding(matrices, parts)

    def _ranks(self, group: GroupView, roles: list[Role], m: int) -> dict[Role, list[int]]:
        """r of each projection and expert. Where bytes are left for one more row of the bases, but
        not for all experts to use it, the first ones do."""
        n, sizes = len(group.experts), []
        for role in roles:
            one_shape(group, role)
            sizes.append(upright(group.experts[0], role).shape)
        caps = [min(d, n * p) for p, d in sizes]
        if not self.bits:
            return {r: [min(self.rank, cap)] * n for r, cap in zip(roles, caps, strict=True)}
        rows = [self.factors * m * d / 8 + 1 for _, d in sizes]
        columns = [self.factors * p / 8 + 1 for p, _ in sizes]
        costs = [row + n * column for row, column in zip(rows, columns, strict=True)]
        fixed = sum(len(as_is(e, r)) for e in group.experts for r in e.matrices if r not in roles)
        fixed += len(roles) * (n * (2 * m + _HEAD) + 12)
        room = self.room(group, uses=1, parts=len(roles_of(group)))
        self.refuse_small(group, room, fixed, "what stays as it is takes more")
        found = ranks([1.0] * len(costs), caps, costs, room - fixed)
        left = room - fixed - float(np.dot(found, costs))
        self.refuse_large(group, left, max(costs))
        chosen = {role: [rank] * n for role, rank in zip(roles, found, strict=True)}
        for role, cap, row, column in zip(roles, caps, rows, columns, strict=True):
            more = min(n, int((left - row) // column))
            if more > 0 and chosen[role][0] < cap:
                chosen[role][:more] = [chosen[role][0] + 1] * more
                left -= row + more * column
        return chosen

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        return _Bases.of(payload)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        kind = read.take(1)[0]
        if kind == 0:
            return take_as_is(read, spec)
        turned, bits = read.take(2)
        if kind != 1 or turned > 1 or bits not in WIDTHS or len(shared) != 1:
            raise CorruptionError(f"kind {kind}, numbers of {bits} bits")
        bases: _Bases = shared[0]
        rows, cols = spec.shape[::-1] if turned else spec.shape
        m, rank, width = bases.codes.shape
        if width != cols:
            raise CorruptionError(f"bases of width {width}, expected {cols}")
        alpha = take_signed(read, (m,), 16).astype(np.int64)
        own = read.varint()
        if own > rank:
            raise CorruptionError(f"rank {own} of bases of rank {rank}")
        unit, left = take_scaled(read, rows, own, bits)
        nothing_left(read)
        weights = ((left @ bases.mixture(alpha).codes[:own]) * unit).astype(np.float32)
        return np.ascontiguousarray(weights.T) if turned else weights


@dataclass(frozen=True, eq=False)
class _Bases:
    """Opened. codes: [m, r, d] int16. unit, exponents: of B_j's row k, u · 2^(e_k)."""

    function: Function
    unit: np.float64
    exponents: Array
    codes: Array

    @classmethod
    def of(cls, payload: memoryview) -> _Bases:
        """Raises CorruptionError."""
        read = FieldReader(payload, 0)
        function, bits = read.take(2)
        m, rank, width = read.varint(), read.varint(), read.varint()
        if function >= len(_FUNCTIONS) or bits not in WIDTHS or m > MAX_BASES:
            raise CorruptionError(f"{m} bases of {bits} bits, function {function}")
        unit, exponents = take_powers(read, rank, 16)
        codes = take_signed(read, (m, rank, width), bits)
        nothing_left(read)
        return cls(_FUNCTIONS[function], unit, exponents, codes)

    def mixture(self, alpha: Array) -> Any:
        """f(Σ_j α_j B_j), [r, d], rounded to 16 bits. alpha: whole numbers of 1/32767."""
        total = np.zeros(self.codes.shape[1:], np.int64)
        for weight, basis in zip(alpha, self.codes, strict=True):
            if weight:
                total += basis * weight
        scale = np.ldexp(self.unit, self.exponents) / _ALPHA
        return rounded(apply(self.function, total * scale[:, None]))


def _part(function: int, b: Array, bits: int) -> bytes:
    """b: [m, r, d]. function, bits, extents, u, e, whole numbers."""
    rank = b.shape[1]
    out = bytearray([function, bits])
    for extent in b.shape:
        put_varint(out, extent)
    top = (1 << (bits - 1)) - 1
    steps = np.abs(b).max(axis=(0, 2), initial=0.0) / top
    unit, exponents = write_powers(out, steps, limit(16, rank))
    codes = np.rint(b / (np.float64(unit) * np.ldexp(1.0, exponents))[:, None]).clip(-top, top)
    return bytes(out) + pack_signed(codes, bits)


def _least_squares(target: Array, basis: Array) -> Array:
    """A with A F next to the target [p, d]."""
    f = torch.from_numpy(basis)
    gram = f @ f.T
    mean = float(gram.diagonal().mean()) if len(gram) else 0.0
    if not mean > 0:
        return np.zeros((len(target), len(basis)))
    gram.diagonal().add_(1e-9 * mean)
    solved = torch.linalg.solve(gram, f @ torch.from_numpy(target).T)
    found: Array = solved.T.contiguous().numpy()
    return found


def fit(target: Array, m: int, rank: int, function: Function, steps: int) -> tuple[Array, Array]:
    """B [m, r, d] float64 and α [n, m], with A free, next to the least mean square error.

    target: [n, p, d] float32. The best state that was seen is kept.
    """
    n, _, d = target.shape
    own = np.arange(n) * m // n
    start = np.zeros((m, rank, d), np.float32)
    for j in range(m):
        _, right, _ = factors(np.concatenate(list(target[own == j])))
        right = right[:rank]
        size = np.sqrt((right**2).mean(axis=1, keepdims=True))
        start[j, : len(right)] = _SCALE * right / np.where(size > 0, size, 1.0)
    logits = np.zeros((n, m), np.float32)
    if m > 1:
        logits[np.arange(n), own] = math.log(_OWN_SHARE * (m - 1) / (1 - _OWN_SHARE))
    deviation = float(target.std())
    if rank and steps and deviation > 0:
        b, logs = _trained(torch.from_numpy(target / deviation), start, logits, function, steps)
    else:
        b, logs = torch.from_numpy(start), torch.from_numpy(logits)
    return b.double().numpy(), logs.double().softmax(-1).numpy()


def _trained(
    target: torch.Tensor, start: Array, logits: Array, function: Function, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and the logits of α after so many steps of Adam, or those of the best step before."""
    n, p, d = target.shape
    f = torch.tanh if function == "tanh" else torch.nn.functional.silu
    b, logs = torch.tensor(start), torch.tensor(logits)
    rank = b.shape[1]
    some = max(1, _AT_ONCE // max(rank * d, p * d))
    spans = [slice(i, min(i + some, n)) for i in range(0, n, some)]

    def values(span: slice) -> torch.Tensor:
        return f(torch.einsum("nm,mrd->nrd", logs[span].softmax(-1), b))

    a = torch.empty(n, p, rank)
    with torch.no_grad():
        for span in spans:
            v = values(span)
            gram = v @ v.mT
            gram += 1e-6 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(rank)
            a[span] = torch.linalg.solve(gram, v @ target[span].mT).mT
    trained = [tensor.requires_grad_() for tensor in (a, b, logs)]
    adam = torch.optim.Adam(trained, lr=RATE)
    best, kept = math.inf, (b.detach().clone(), logs.detach().clone())
    for step in range(steps + 1):
        adam.zero_grad()
        loss = 0.0
        for span in spans:
            part = ((a[span] @ values(span) - target[span]) ** 2).sum() / target.numel()
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        if loss < best:
            best, kept = loss, (b.detach().clone(), logs.detach().clone())
        if step < steps:
            adam.param_groups[0]["lr"] = RATE / 2 * (1 + math.cos(math.pi * step / steps))
            adam.step()
    return kept
