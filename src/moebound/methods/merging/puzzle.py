"""PuzzleMoE (2511.04805): two experts in the bits of one: `puzzle_moe_re:seed0`.

Experts of a layer are paired at random. Of two weights a and b in the same place of a pair's
matrices, with |a| and |b| their sizes and rms the root mean square of what comes in there:

    similar   where  ||a| - |b|| <= 0.4 (|a| + |b|)
    W_m       (|a| + |b|) / 2 where similar, else that of the more salient one:
              |a| where |a| rms_i >= |b| rms_j, else |b|
    mask      whose expert has this weight: both where similar, else the more salient one alone; not
              one whose weight is 0
    again     sign · mask · W_m

Stored, for each pair and projection, in one part that both experts share: 16 bits for each pair of
weights, 2 signs, 2 masks, and of W_m in bfloat16 7 bits of mantissa and 5 of exponent
(112 to 143: the exponent of what is smaller or larger is set to these, so that no weight is below
2^-15). That is 8 bits a weight, whatever the
weights are. `puzzle_moe_re:seed0+rtn:int3:g64` has W_m coded by that method instead, and 4 bits of
signs and masks beside it. Of an odd number of experts, one stays as it is.

From the statistics `inputs_diagonal` and `hidden_diagonal`: rms is that of g x a token, shrunk
toward the layer's, so that an expert that saw little is not passed over.

Reimplemented (`_re`) from two readers' notes. Deviations: rms with the router's weight g in it, and
per token (the paper's norm of X would let the busier expert win everywhere); weights in float16 or
float32 are rounded to bfloat16; the quantized variant's bytes are ours. Nothing is promised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np

from moebound.checkpoint import Role
from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError, MethodError
from moebound.methods.artifact import compress_expert
from moebound.methods.base import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    SharedPayload,
)
from moebound.methods.packing import pack, packed_bytes, unpack
from moebound.methods.reading import Stored
from moebound.methods.registry import get_method
from moebound.types import NUMPY_DTYPES, Array, ExpertKey

SIMILAR = 0.4
SHRUNK_BY = 16
"""Tokens that the layer's mean counts for, where an expert's own are summed up."""
_OPTIONS = re.compile(r"(?:seed([0-9]{1,9}))?(?:\+(.+))?")
_FIRST, _SECOND, _WHOLE = b"\0", b"\1", b"\2"
_PACKED, _CODED = 0, 1
_LEAST, _MOST = 112, 143


@dataclass(frozen=True)
class PuzzleMoe(Method):
    """seed: of the pairs. inner: the setting of what codes W_m; None for 12 bits of it."""

    id: ClassVar[str] = "puzzle_moe_re"
    scope = "layer"
    statistics: ClassVar[frozenset[str]] = frozenset(
        {"tokens", "inputs_diagonal", "hidden_diagonal"}
    )
    seed: int = 0
    inner: str | None = None

    @classmethod
    def from_options(cls, options: str) -> Self:
        found = _OPTIONS.fullmatch(options)
        if found is None:
            raise MethodError(
                f"method '{cls.id}:{options}': expected the seed of the pairs, then a method for "
                f"what they share, as in {cls.id}:seed0 or {cls.id}:seed0+rtn:int3:g64"
            )
        inner = None if found[2] is None else get_method(found[2])
        if inner is not None and (inner.scope != "expert" or inner.statistics or inner.bounded):
            raise MethodError(
                f"method '{cls.id}:{options}': what pairs share is coded by a method that looks at "
                f"one matrix and takes no bound, as rtn:int3:g64; found {inner.setting}"
            )
        return cls(int(found[1] or 0), None if inner is None else inner.setting)

    @property
    def setting(self) -> str:
        return f"{self.id}:seed{self.seed}" + (f"+{self.inner}" if self.inner else "")

    @property
    def needs(self) -> tuple[str, ...]:
        return get_method(self.inner).needs if self.inner else ()

    @property
    def versions(self) -> tuple[int, ...]:
        return (self.version, *(get_method(self.inner).versions if self.inner else ()))

    def n_parts(self, roles: Sequence[Role], n_experts: int) -> int:
        return len(roles) * (n_experts // 2)

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        return frozenset() if shared else self.statistics  # a layer's shared experts have no text

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        keys = [e.key for e in group.experts]
        seen = {name: {k: found[k] for k in keys} for name, found in group.statistics.items()}
        group = replace(group, statistics=seen)  # each read once
        shared: list[SharedPayload] = []
        order = sorted(group.experts, key=self._drawn)
        for first, second in zip(order[::2], order[1::2], strict=False):
            for role in first.matrices:
                shared.append(self._pair(first, second, role, group))
                for expert, which in ((first, _FIRST), (second, _SECOND)):
                    matrices[expert.key][role] = Payload(which, uses=(len(shared) - 1,))
        if len(order) % 2:
            last = order[-1]
            for role, matrix in last.matrices.items():
                matrices[last.key][role] = Payload(_WHOLE + matrix.tobytes())
        return Encoding(matrices, shared)

    def _drawn(self, expert: ExpertView) -> bytes:
        return hashlib.sha256(f"{self.seed} {expert.key}".encode()).digest()

    def _pair(
        self, first: ExpertView, second: ExpertView, role: Role, group: GroupView
    ) -> SharedPayload:
        both = [expert.matrices[role].astype(np.float32) for expert in (first, second)]
        if not all(np.isfinite(matrix).all() for matrix in both):
            raise MethodError(f"{first.key} and {second.key}, {role}: a weight is not finite")
        rms = [_rms(expert.key, role, group) for expert in (first, second)]
        if role in first.transposed:
            rms = [values[:, None] for values in rms]
        size, masks = merged(both[0], both[1], rms[0], rms[1])
        signs = [np.signbit(matrix) for matrix in both]
        bits = np.zeros(size.shape, np.uint16)
        for place, flag in enumerate((*masks, *signs)):
            bits |= flag.astype(np.uint16) << np.uint16(place)
        if self.inner is None:
            codes = packed(size, bits)
            return SharedPayload(bytes([_PACKED]) + codes.astype("<u2").tobytes(), codes.nbytes)
        dtype = first.matrices[role].dtype
        view = ExpertView(first.key, {role: size.astype(dtype)})
        made = compress_expert(get_method(self.inner), view).experts[first.key][role]
        out = bytearray([_CODED])
        put_varint(out, len(made.data))
        out += made.data + pack(bits.astype(np.uint8).reshape(-1), 4)
        return SharedPayload(bytes(out), 5 * size.size)

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        """Sizes, [n] float32, with signs and masks, [n]; or 16 bits, [n], and None."""
        read = FieldReader(payload, 0)
        (kind,) = read.take(1)
        if kind == _PACKED:
            if read.left % 2:
                raise CorruptionError(f"{read.left} bytes of numbers of two bytes each")
            return np.frombuffer(read.take(read.left), "<u2"), None
        if kind != _CODED:
            raise CorruptionError(f"pairs of kind {kind}: expected 0 or 1")
        stored = Stored.of(read.take(read.varint()))
        if stored.needs or read.left != packed_bytes(stored.spec.size, 4):
            raise CorruptionError(f"{read.left} bytes of signs for shape {stored.spec.shape}")
        bits = unpack(read.take(read.left), stored.spec.size, 4)
        size = stored.decode(threads=1, max_bytes=stored.spec.n_bytes)
        return size.astype(np.float32).reshape(-1), bits

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        which = bytes(payload[:1])
        if which == _WHOLE and not shared:
            if len(payload) != 1 + spec.n_bytes:
                raise CorruptionError(f"{len(payload)} bytes for shape {spec.shape}")
            return np.frombuffer(payload[1:], NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        if len(payload) != 1 or which not in (_FIRST, _SECOND) or len(shared) != 1:
            raise CorruptionError(f"payload {bytes(payload[:8])!r}, {len(shared)} shared parts")
        size, bits = shared[0]
        if size.size != spec.size:
            raise CorruptionError(f"a pair's part of {size.size} weights, for shape {spec.shape}")
        if bits is None:
            size, bits = unpacked(size)
        mask = bits >> which[0] & 1
        sign = bits >> (2 + which[0]) & 1
        found: Array = np.where(mask, np.where(sign, -size, size), 0).reshape(spec.shape)
        return found.astype(np.float32, copy=False)

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        return 1 << 28  # a byte of its own, and a shared part whose length is compared


def _rms(key: ExpertKey, role: Role, group: GroupView) -> Array:
    """[N] float32, of one expert's inputs of this projection."""
    name = "hidden_diagonal" if role == "down" else "inputs_diagonal"
    if name not in group.statistics:  # shared experts get every token: all are alike
        return np.ones(1, np.float32)
    found: Mapping[ExpertKey, Array] = group.statistics[name]
    tokens = {k: float(group.statistics["tokens"][k]) for k in found}
    layer = sum(found.values()) / max(sum(tokens.values()), 1)
    mean = (found[key] + SHRUNK_BY * layer) / (tokens[key] + SHRUNK_BY)
    whole = np.sqrt(mean)
    return (whole if whole.any() else np.ones_like(whole)).astype(np.float32)


def merged(a: Array, b: Array, rms_a: Array, rms_b: Array) -> tuple[Array, tuple[Array, Array]]:
    """W_m, float32 of a's shape, and the two masks. a, b: float32. rms: of what they multiply."""
    a, b = np.abs(a), np.abs(b)
    similar = np.abs(a - b) <= np.float32(SIMILAR) * (a + b)
    salient = a * rms_a >= b * rms_b
    size = np.where(similar, (a + b) / 2, np.where(salient, a, b))
    return size, ((similar | salient) & (a > 0), (similar | ~salient) & (b > 0))


def packed(size: Array, bits: Array) -> Array:
    """16 bits for each weight pair. size: W_m, 0 or more. bits: two masks, two signs, from the
    lowest."""
    raw = size.astype(ml_dtypes.bfloat16).view(np.uint16)
    exponent = np.clip(raw >> 7, _LEAST, _MOST) - _LEAST
    found: Array = bits << 12 | exponent << 7 | raw & 127
    return found


def unpacked(codes: Array) -> tuple[Array, Array]:
    """size float32, and bits, of what `packed` made."""
    raw = ((codes >> 7 & 31) + _LEAST) << 7 | codes & 127
    return raw.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32), codes >> 12
