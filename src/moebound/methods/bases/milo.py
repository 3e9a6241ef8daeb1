"""MiLo (Huang et al., 2504.02658): few bits, and a low-rank compensator: `milo_fixed:b4`.

    W ≈ Q + U V        section 3: in turns, Q by HQQ of W - U V, U V the SVD of W - Q at rank r

Q has groups of 64 weights (gN) with a float16 scale and zero point each, integers of 3 bits (intN),
and HQQ's zero points (Badri and Shaji, 2023): E = shrink(W - Q, |·|^0.7, β), z = mean(q - (W - E)
s), β from 10 by 1.01, at most 20 steps, until mean |W - Q| rises. No data.

Stored: Q, as method `hqq` writes it; U V as a product of 4-bit whole numbers (fN) (`exact.py`).
Repaired, of the released code: its compensator's scale is the largest number of a group, not the
largest magnitude, which destroys groups of small or negative ones; the best turn is kept, with the
rounded U V, where it keeps the last. Deviations: compensators of 4 bits with a step a rank, where
the paper has 3 and a step for each 64; 3 turns (iN; the paper 10). Ranks are equal, or by tokens
(`freq`: r_e = cnt share · r · n); with bN the widest integers that leave a 32nd of the bytes or
more are taken, and the rest goes to ranks. No ranks by kurtosis: they are for a model whose
attention is compressed as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import MethodError
from moebound.methods.base import Encoding, GroupView, MatrixSpec, Payload
from moebound.methods.bases.approximation import (
    BITS,
    FACTORS,
    RANK,
    Approximation,
    Option,
    as_stored,
    places,
    ranks,
    tokens,
)
from moebound.methods.bases.exact import nothing_left, per_rank, take_product, write_product
from moebound.methods.bases.lowrank import factors
from moebound.methods.packing import pack, packed_bytes
from moebound.methods.rtn import take_groups
from moebound.types import Array, ExpertKey

_HEAD = 12
_POWER, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True)
class Milo(Approximation):
    """A payload: the integers, as `hqq`, and a product."""

    id: ClassVar[str] = "milo_fixed"
    statistics: ClassVar[frozenset[str]] = frozenset({"tokens"})
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "r": RANK, "f": FACTORS,
        "int": Option("width", 2, 8, "bits of an integer"),
        "g": Option("group", 2, 1 << 20, "weights that share a scale"),
        "i": Option("turns", 1, 100, "turns"),
        "freq": Option("by_tokens", means="ranks by tokens"),
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "r")
    factors: int = 4
    rank: int = -1
    width: int = 0
    group: int = 64
    turns: int = 3
    by_tokens: bool = False

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        return super().wanted_statistics(shared=shared) if self.by_tokens else frozenset()

    def _encode(self, group: GroupView) -> Encoding:
        shapes = [expert.matrices[role].shape for expert, role in places(group)]
        width, found = self._sizes(group, shapes)
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for (expert, role), rank in zip(places(group), found, strict=True):
            data = self._matrix(as_stored(expert, role), width, rank)
            matrices[expert.key][role] = Payload(data)
        return Encoding(matrices)

    def _sizes(self, group: GroupView, shapes: list[tuple[int, ...]]) -> tuple[int, list[int]]:
        """Bits of an integer, and the rank of every matrix."""
        caps, costs = list(map(min, shapes)), [per_rank(s, self.factors) for s in shapes]
        scores = [1.0] * len(shapes)
        if self.by_tokens:
            count = tokens(group)
            scores = [count[expert.key] for expert, _ in places(group)]
        if not self.bits:
            width = self.width or 3
            return width, ranks(scores, caps, costs, self.rank * sum(costs))
        room = self.room(group)
        sizes = {w: sum(self.quantized_bytes(s, w) + _HEAD for s in shapes) for w in range(2, 9)}
        fitting = [w for w, size in sizes.items() if size <= room * 31 / 32] or [2]
        width = self.width or max(fitting)
        self.refuse_small(group, room, sizes[width], f"integers of {width} bits take more")
        left = room - sizes[width]
        found = ranks(scores, caps, costs, left)
        self.refuse_large(group, left - float(np.dot(found, costs)), max(costs))
        return width, found

    def quantized_bytes(self, shape: tuple[int, ...], width: int) -> int:
        """q(O, N, b, g): integers, and two float16 a group."""
        n = int(np.prod(shape))
        return packed_bytes(n, width) + 4 * -(-n // self.group)

    def _matrix(self, w: Array, width: int, rank: int) -> bytes:
        best: tuple[float, bytes] | None = None
        near = np.zeros_like(w)
        for _ in range(self.turns if rank else 1):
            integers, q = self._quantized(w - near, width)
            left, right, _ = factors(w - q)
            product = write_product(left[:, :rank], right[:rank], self.factors)
            near = take_product(FieldReader(memoryview(product), 0), w.shape)
            error = float(((w - q - near) ** 2).sum())
            if best is None or error < best[0]:
                out = bytearray()
                put_varint(out, len(integers))
                best = error, bytes(out) + integers + product
        return b"" if best is None else best[1]

    def _quantized(self, w: Array, width: int) -> tuple[bytes, Array]:
        """As `hqq` writes it, and what that decodes to."""
        flat, group = w.reshape(-1), min(self.group, max(1, w.size))
        groups = np.pad(flat, (0, -len(flat) % group), mode="edge").reshape(-1, group)
        top = float(2**width - 1)
        low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        with np.errstate(over="ignore"):
            step = ((high - low) / top).astype(np.float16).astype(np.float64)
        if not np.isfinite(step).all():
            raise MethodError("a scale is beyond float16")
        step = np.where(step > 0, step, 2.0**-24)
        zero, beta, before = -low / step, _BETA, np.inf
        kept = zero
        for _ in range(_STEPS):
            codes = np.clip(np.rint(groups / step + zero), 0, top)
            rest = groups - (codes - zero) * step
            now = float(np.abs(rest).mean())
            if now >= before:
                break
            before, kept = now, zero
            size = np.abs(rest)
            with np.errstate(divide="ignore"):
                shrunk = np.maximum(size - size ** (_POWER - 1) / beta, 0) * np.sign(rest)
            zero = (codes - (groups - shrunk) / step).mean(axis=1, keepdims=True)
            beta *= _GROWTH
        zero = kept.astype(np.float16).astype(np.float64)
        codes = np.clip(np.rint(groups / step + zero), 0, top).astype(np.uint8)
        own = codes.reshape(-1)[: len(flat)]
        head = bytearray([width, 0])
        put_varint(head, self.group)
        data = step.astype("<f2").tobytes() + zero.astype("<f2").tobytes() + pack(own, width)
        weights = ((codes - zero) * step).reshape(-1)[: len(flat)].reshape(w.shape)
        return bytes(head) + data, weights

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        found = take_groups(read.take(read.varint()), spec).astype(np.float64)
        found += take_product(read, spec.shape)
        nothing_left(read)
        return found.astype(np.float32)
