"""ResMoE (Ai et al., 2503.06881): a barycentre of a layer's experts, and sparse differences from
it: `resmoe_fixed:b5`.

An expert is p hidden neurons, each a row [gate | up | down] of 3 d weights, and their order says
nothing. So (section 4)

    B      the rows with the least Σ_e min_T |T W_e - B|²: the free-support Wasserstein barycentre
           of uniform masses, found by turns: permutations T_e by optimal assignment, B their mean;
           it begins with the first expert
    Δ_e    T_e W_e - B, of which the largest |Δ|, of the whole layer, are kept (kN: that share; the
           paper keeps 25 %)

Stored: B, in the checkpoint's dtype (`baseN`: N-bit entropy-coded whole numbers); for each expert
and projection where Δ is kept (a bit each, or positions if they are fewer bytes) and 16-bit whole
numbers (fN: N-bit); T_e, a byte or two a neuron, so that weights come back in their own places,
which the paper leaves out, as the expert computes the same without.

Repaired, of the released code: a row's partner is where its transport plan is largest, so ties give
rows twice; here it is an assignment. Deviations: at most 8 turns (the paper: 100 of POT's solver,
which with equal masses ends in permutations); Δ against B as it is stored; no SVD of Δ: that is
d2_moe.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from moebound.checkpoint import Role
from moebound.codec.arrays import dtype_name
from moebound.codec.fields import FieldReader, put_varint
from moebound.codec.patch import pack_positions, positions_n_bytes, unpack_positions
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
    n_weights,
    one_shape,
    places,
    roles_of,
)
from moebound.methods.bases.assignment import assign
from moebound.methods.bases.d2_moe import BASE
from moebound.methods.bases.exact import (
    WIDTHS,
    dense_part,
    nothing_left,
    open_dense,
    pack_signed,
    take_signed,
)
from moebound.methods.bases.shared import from_neurons, neurons
from moebound.types import Array, ExpertKey

TURNS = 8
_HEAD = 11
_BINS = 1 << 15


@dataclass(frozen=True)
class ResMoe(Approximation):
    """A payload: where Δ is kept, and its values. Part 0: permutations; part i + 1: B of projection
    i."""

    id: ClassVar[str] = "resmoe_fixed"
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "k": Option("keep", 0, 1, "the share of Δ that is kept"), "f": FACTORS,
        "base": BASE,
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "k")
    keep: float = -1.0
    base: int = 16

    def n_shared(self, roles: Sequence[Role]) -> int:
        return 1 + len(roles)

    def _encode(self, group: GroupView) -> Encoding:
        roles = roles_of(group)
        for role in roles:
            one_shape(group, role)
        mean, orders = barycentre(group.experts)
        parts = [_orders_part(orders)]
        bases: dict[Role, Array] = {}
        for role, whole in zip(roles, _split(group.experts[0], mean), strict=True):
            dtype = dtype_name(group.experts[0].matrices[role].dtype)
            parts.append(dense_part(whole, self.base, dtype))
            bases[role] = open_dense(memoryview(parts[-1].data)).astype(np.float64)
        mean = np.concatenate([bases[role] for role in roles], axis=1)
        count = self._count(group, parts)
        # The largest of all, by the first 16 bits of their float32: sign, exponent, 7 of mantissa.
        held = np.zeros(_BINS, np.int64)
        for expert, order in zip(group.experts, orders, strict=True):
            held += np.bincount(_bins(_rows(expert)[order] - mean).reshape(-1), minlength=_BINS)
        above = np.cumsum(held[::-1])[::-1]
        last = int(np.searchsorted(-above, -count, side="left")) - 1 if count else _BINS - 1
        last = max(last, 0)
        spare = count - int(above[last + 1] if last + 1 < _BINS else 0)
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for e, (expert, order) in enumerate(zip(group.experts, orders, strict=True)):
            for at, role in enumerate(roles):
                rows, how = neurons(expert, role)
                delta = (rows[order] - bases[role]).reshape(-1)
                bins = _bins(delta)
                kept = bins > last
                if spare > 0:
                    partly = np.flatnonzero(bins == last)[:spare]
                    kept[partly] = True
                    spare -= len(partly)
                data = self._matrix(delta, np.flatnonzero(kept), how, e)
                matrices[expert.key][role] = Payload(data, uses=(0, at + 1))
        return Encoding(matrices, parts)

    def _matrix(self, delta: Array, at: Array, how: int, number: int) -> bytes:
        out, top = bytearray([how, self.factors]), (1 << (self.factors - 1)) - 1
        put_varint(out, number)
        put_varint(out, len(at))
        if not len(at):
            return bytes(out)
        as_bits = len(delta) // 8 < positions_n_bytes(len(delta), len(at))
        out.append(int(as_bits))
        if as_bits:
            mask = np.zeros(len(delta), np.uint8)
            mask[at] = 1
            out += np.packbits(mask, bitorder="little").tobytes()
        else:
            out += pack_positions(at.astype(np.uint64), len(delta))
        step = np.float32(np.abs(delta[at]).max() / top) or np.float32(1)
        codes = np.rint(delta[at] / np.float64(step)).clip(-top, top)
        out += step.astype("<f4").tobytes()
        return bytes(out) + pack_signed(codes, self.factors)

    def _count(self, group: GroupView, parts: Sequence[SharedPayload]) -> int:
        """How many weights of Δ are kept, of the layer."""
        total = n_weights(group)
        if not self.bits:
            return int(self.keep * total)
        room = self.room(group, uses=2, parts=len(parts))
        fixed = sum(len(part.data) for part in parts) + _HEAD * sum(1 for _ in places(group))
        self.refuse_small(group, room, fixed, "the barycentre alone takes more")
        low, high = 0, total
        while low < high:
            middle = (low + high + 1) // 2
            where = min(total // 8, positions_n_bytes(total, middle))
            if where + middle * self.factors / 8 <= room - fixed:
                low = middle
            else:
                high = middle - 1
        left = room - fixed - total // 8 - total * self.factors / 8
        self.refuse_large(group, left, 64.0 * len(group.experts))
        return low

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        read = FieldReader(payload, 0)
        if bytes(payload[:1]) != b"\0":
            return open_dense(payload)
        read.take(1)
        wide = read.take(1)[0]
        n, p = read.varint(), read.varint()
        if wide not in (1, 2):
            raise CorruptionError(f"permutations of {wide} bytes a neuron")
        found = np.frombuffer(read.take(wide * n * p), f"<u{wide}").reshape(n, p)
        nothing_left(read)
        return found

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        how, bits = read.take(2)
        number, count = read.varint(), read.varint()
        if len(shared) != 2 or bits not in WIDTHS or number >= len(shared[0]):
            raise CorruptionError(f"expert {number}, numbers of {bits} bits")
        order, base = shared[0][number].astype(np.int64), shared[1]
        if base.size != spec.size or len(order) != len(base) or count > spec.size:
            raise CorruptionError(f"a base of shape {base.shape} for a matrix of {spec.shape}")
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise CorruptionError("an order that is no permutation")
        rows = base.astype(np.float64)
        if count:
            if read.take(1)[0]:
                mask = np.frombuffer(read.take((spec.size + 7) // 8), np.uint8)
                at = np.flatnonzero(np.unpackbits(mask, count=spec.size, bitorder="little"))
            else:
                packed = read.take(positions_n_bytes(spec.size, count))
                at = unpack_positions(packed, spec.size, count).astype(np.int64)
            if len(at) != count:
                raise CorruptionError(f"{len(at)} places of {count} numbers")
            step = np.float64(np.frombuffer(read.take(4), "<f4")[0])
            rows.reshape(-1)[at] += take_signed(read, (count,), bits) * step
        nothing_left(read)
        found = np.empty(rows.shape, np.float32)
        found[order] = rows
        return from_neurons(found, how, spec.shape)


def barycentre(experts: Sequence[ExpertView]) -> tuple[Array, list[Array]]:
    """B [p, 3 d] float64, and for each expert the order of its neurons next to B."""
    mean = _rows(experts[0])
    orders = [np.arange(len(mean)) for _ in experts]
    for _ in range(TURNS):
        found = []
        total = np.zeros_like(mean)
        for expert in experts:
            rows = _rows(expert)
            # |b - w|² differs from -2 b·w by what no order changes.
            near = torch.from_numpy(mean) @ torch.from_numpy(rows).T
            order = assign(-near.numpy())
            found.append(order)
            total += rows[order]
        mean = total / len(experts)
        settled = all(np.array_equal(a, b) for a, b in zip(orders, found, strict=True))
        orders = found
        if settled:
            break
    return mean, orders


def _rows(expert: ExpertView) -> Array:
    """[p, 3 d]: a neuron a row."""
    return np.concatenate([neurons(expert, role)[0] for role in expert.matrices], axis=1)


def _split(expert: ExpertView, whole: Array) -> list[Array]:
    widths = [neurons(expert, role)[0].shape[1] for role in expert.matrices]
    return np.split(whole, np.cumsum(widths)[:-1], axis=1)


def _bins(values: Array) -> Array:
    """Of magnitudes: the first 16 bits of float32."""
    return np.abs(values).astype(np.float32).view(np.uint32) >> 16


def _orders_part(orders: Sequence[Array]) -> SharedPayload:
    n, p = len(orders), len(orders[0])
    wide = 1 if p <= 256 else 2
    out = bytearray([0, wide])
    for extent in (n, p):
        put_varint(out, extent)
    out += np.stack(orders).astype(f"<u{wide}").tobytes()
    return SharedPayload(bytes(out), held_bytes=wide * n * p)
