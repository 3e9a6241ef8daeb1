"""What another method leaves, coded so that every weight keeps a bound: `residual:svd:b1`.

    R = W - Ŵ_base             against the base as it is stored and decoded
    W' = cast(Ŵ_base + R')     |R - R'| <= ε (1 - s), and what the sum or the cast moves beyond ε is
                               stored verbatim

R is coded by codec `bound`, or by `calibrated`, which looks at inputs
(`residual:calibrated:svd:b1`): error feedback on R with the same H, clamped on R. s is that of a
few that takes the fewest bytes: where ε is near the spacing of the dtype's numbers, a narrower
bound on R costs less than verbatim weights. Every base decodes to the same bits on every machine
(`exact.py`), and so does the sum.

A base pays if it saves more bits of R than it takes: a base that n experts share, of b bits a
weight, if ½ log2(1 / (1 - ρ)) n >= b, ρ the share of W² that it explains; a low-rank one of r (O +
N) numbers of b bits, if ½ log2(1 / (1 - ρ)) O N >= b r (O + N).

Weights that are not finite are 0 for the base, and stored verbatim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from moebound.checkpoint import Role
from moebound.codec import Encoded, decode_array, encode_certified, parse, stats
from moebound.codec.fields import FieldReader, put_varint
from moebound.codec.patch import pack_positions, positions_n_bytes, unpack_positions
from moebound.errors import CorruptionError, FormatError, MethodError
from moebound.methods.artifact import decode_payload
from moebound.methods.base import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    Scope,
    SharedPayload,
)
from moebound.methods.bases.exact import nothing_left
from moebound.methods.bounded import reference
from moebound.methods.registry import get_method, method_class
from moebound.types import NUMPY_DTYPES, Array, ErrorBound

BOUND, CALIBRATED = "bound", "calibrated"
_KAPPA = re.compile(r"k\d")
_NARROWER = (0.0, 1 / 256, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""What s may be."""
_VERBATIM_BITS = 24
"""About what a weight costs that is stored verbatim."""


@dataclass(frozen=True)
class Residual(Method):
    """inner: the base, a setting. rest: what codes R, a setting.

    A payload: the base's, what codes R, and what is verbatim. Parts are the base's.
    """

    id: ClassVar[str] = "residual"
    scope: ClassVar[Scope] = "layer"
    takes_bound: ClassVar[bool] = True
    inner: str = "svd:b1"
    rest: str = BOUND

    @classmethod
    def from_options(cls, options: str) -> Self:
        """Raises as `get_method` for the base; MethodError for one that cannot be one."""
        coder, _, rest = options.partition(":")
        if coder == CALIBRATED and _KAPPA.match(rest):
            kappa, _, rest = rest.partition(":")
            coder = f"{coder}:{kappa}"
        elif coder not in (BOUND, CALIBRATED):
            coder, rest = BOUND, options
        if not rest:
            raise MethodError(
                f"method 'residual:{options}': expected a method behind it, as in residual:svd:b1 "
                "or residual:calibrated:svd:b1"
            )
        inner = get_method(rest)
        if inner.bounded or inner.edits_router or inner.lossless:
            raise MethodError(
                f"method 'residual:{options}': {inner.setting!r} keeps a bound or every bit "
                "itself, or takes experts away; expected a method that only approximates"
            )
        return cls(inner.setting, get_method(coder).setting if coder != BOUND else BOUND)

    @property
    def setting(self) -> str:
        return ":".join([self.id, *([] if self.rest == BOUND else [self.rest]), self.inner])

    @property
    def needs_bound(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        return self._inner.needs

    @property
    def versions(self) -> tuple[int, ...]:
        return (self.version, *self._inner.versions, *get_method(self.rest).versions)

    @cached_property
    def _inner(self) -> Method:
        return get_method(self.inner)

    @cached_property
    def _calibrated(self) -> Method | None:
        return None if self.rest == BOUND else get_method(self.rest)

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        own = self._inner.wanted_statistics(shared=shared)
        coder = self._calibrated
        return own if coder is None else own | coder.wanted_statistics(shared=shared)

    def n_shared(self, roles: Sequence[Role]) -> int:
        return self._inner.n_shared(roles)

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """A base of rank 0 and nothing left of it are a few bytes, whatever the shape."""
        return 1 << 40

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        inner = self._inner
        bases = tuple(
            replace(e, bounds=None, matrices={r: _finite(m) for r, m in e.matrices.items()})
            for e in group.experts
        )
        made = inner.encode(GroupView(bases, group.statistics), threads=threads)
        name = _name(inner)
        opened = [inner.open_shared(memoryview(part.data)) for part in made.shared]
        matrices = {
            expert.key: self._expert(
                expert, group, made.matrices[expert.key], opened, name, threads
            )
            for expert in group.experts
        }
        shared = [SharedPayload(name + part.data, part.held_bytes) for part in made.shared]
        return Encoding(matrices, shared)

    def _expert(
        self,
        expert: ExpertView,
        group: GroupView,
        base: Mapping[Role, Any],
        opened: Sequence[Any],
        name: bytes,
        threads: int,
    ) -> dict[Role, Payload]:
        if expert.bounds is None:
            raise MethodError(f"{expert.key}: no bound was given")
        whole = reference(expert.matrices, expert.bounds)
        left: dict[Role, _Left] = {}
        for role, array in expert.matrices.items():
            bound, payload = expert.bounds[role], base[role]
            if not bound.pointwise:
                raise MethodError(f"bound {bound}: an average promise; expected one on each weight")
            if not isinstance(payload, Payload):
                raise MethodError(f"method {self.inner!r}: made an envelope, expected a payload")
            own = whole if whole is not None and bound.scope == "expert" else stats(array)
            parts = [opened[part] for part in payload.uses]
            spec = MatrixSpec(array.shape, "F32")
            near = decode_payload(type(self._inner), memoryview(payload.data), spec, parts)
            left[role] = _Left.of(array, near, bound.absolute(own))
        coded = self._coded(expert, group, left, threads)
        found: dict[Role, Payload] = {}
        for role, array in expert.matrices.items():
            out = bytearray(name)
            put_varint(out, len(base[role].data))
            out += base[role].data
            data, rest = coded[role]
            put_varint(out, len(data))
            out += data
            misses = left[role].misses(array, rest)
            put_varint(out, len(misses))
            if len(misses):
                out += pack_positions(misses.astype(np.uint64), array.size)
                out += array.reshape(-1)[misses].tobytes()
            found[role] = Payload(
                bytes(out), base[role].uses, promise=expert.bounds[role],
                abs_bound=left[role].epsilon, patched=len(misses),
            )  # fmt: skip
        return found

    def _coded(
        self, expert: ExpertView, group: GroupView, left: Mapping[Role, _Left], threads: int
    ) -> dict[Role, tuple[bytes, Array]]:
        """R of each matrix, coded, and what that decodes to. No bytes where ε is 0."""
        asked = {role: some for role, some in left.items() if some.narrowed > 0}
        found = {r: (b"", np.zeros_like(some.rest)) for r, some in left.items() if r not in asked}
        coder = self._calibrated
        if coder is None:
            for role, some in asked.items():
                made = encode_certified(some.rest, ErrorBound(some.narrowed), threads=threads)
                found[role] = made.data, made.decoded
            return found
        view = ExpertView(
            expert.key,
            {role: some.rest for role, some in asked.items()},
            {role: ErrorBound(some.narrowed) for role, some in asked.items()},
            expert.transposed,
        )
        coded = coder.encode(GroupView((view,), group.statistics)).matrices[expert.key]
        return found | {r: (m.data, m.decoded) for r, m in coded.items() if isinstance(m, Encoded)}

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        read = FieldReader(payload, 0)
        inner = _take_inner(read)
        return inner.id, inner.open_shared(read.take(read.left))

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        inner = _take_inner(read)
        if any(name != inner.id for name, _ in shared):
            raise CorruptionError(f"a part of another method than {inner.id!r}")
        as_f32 = MatrixSpec(spec.shape, "F32")
        base = read.take(read.varint())
        near = decode_payload(inner, base, as_f32, [content for _, content in shared])
        rest = _take_rest(FieldReader(read.take(read.varint()), 0), as_f32)
        n, dtype = read.varint(), NUMPY_DTYPES[spec.dtype]
        if n > spec.size:
            raise CorruptionError(f"{n} weights verbatim of {spec.size}")
        weights = _sum(near, rest, dtype)
        if n:
            positions = read.take(positions_n_bytes(spec.size, n))
            verbatim = np.frombuffer(read.take(n * dtype.itemsize), dtype)
            weights.reshape(-1)[unpack_positions(positions, spec.size, n)] = verbatim
        nothing_left(read)
        return weights

    @classmethod
    def verbatim(cls, payload: memoryview, spec: MatrixSpec) -> int:
        read = FieldReader(payload, 0)
        _take_inner(read)
        for _ in range(2):
            read.take(read.varint())
        n = read.varint()
        if n > spec.size:
            raise CorruptionError(f"{n} weights verbatim of {spec.size}")
        return n


@dataclass(frozen=True, eq=False)
class _Left:
    """What a base leaves of a matrix. near: the base, float32. rest: R, float32. epsilon: ε.
    narrowed: ε (1 - s), 0 where ε is."""

    near: Array
    rest: Array
    epsilon: float
    narrowed: float

    @classmethod
    def of(cls, array: Array, near: Array, epsilon: float) -> _Left:
        original = _finite(array).astype(np.float64)
        rest = (original - near.astype(np.float64)).astype(np.float32)
        if not np.isfinite(rest).all():
            raise MethodError("a base that is not finite")
        best, narrowed = np.inf, 0.0
        for share in _NARROWER if epsilon > 0 else ():
            step = 2 * epsilon * (1 - share)
            with np.errstate(over="ignore", invalid="ignore"):
                near_rest = (np.rint(rest / step) * step).astype(np.float32)
                off = np.abs(original - _sum(near, near_rest, array.dtype).astype(np.float64))
            n_off = int(np.count_nonzero(~(off <= epsilon)))
            cost = n_off * _VERBATIM_BITS - array.size * np.log2(1 - share)
            if cost < best:
                best, narrowed = cost, epsilon * (1 - share)
            if not n_off:
                break
        return cls(near, rest, epsilon, narrowed)

    def misses(self, array: Array, rest: Array) -> Array:
        """Flat places of weights that are off by more than ε once they are cast."""
        with np.errstate(invalid="ignore"):
            decoded = _sum(self.near, rest, array.dtype).astype(np.float64)
            kept = np.abs(array.astype(np.float64) - decoded) <= self.epsilon
        return np.flatnonzero(~kept)


def _finite(array: Array) -> Array:
    bad = ~np.isfinite(array.astype(np.float32))
    return np.where(bad, np.zeros((), array.dtype), array) if bad.any() else array


def _sum(near: Array, rest: Array, dtype: np.dtype[Any]) -> Array:
    """One rounding to float32, then the model's cast."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Array = (near + rest).astype(dtype)
    return found


def _name(inner: Method) -> bytes:
    return bytes([len(inner.id)]) + inner.id.encode() + bytes([inner.version])


def _take_inner(read: FieldReader) -> type[Method]:
    """The base's method. Raises CorruptionError, MethodError for one that is unknown here, and
    FormatError for one that is newer than here."""
    name = bytes(read.take(read.take(1)[0])).decode("ascii", "replace")
    version = read.take(1)[0]
    if name == Residual.id:
        raise CorruptionError("a residual of a residual")
    inner = method_class(name)
    if version > inner.version:
        raise FormatError(
            f"method {name!r} version {version}: here it is at version {inner.version}; install a "
            "newer one"
        )
    return inner


def _take_rest(read: FieldReader, spec: MatrixSpec) -> Array:
    """R', float32: of all bytes. Raises CorruptionError, FormatError."""
    if not read.left:
        return np.zeros(spec.shape, np.float32)
    found = parse(read.take(read.left))
    if found.spec.shape != spec.shape or found.spec.dtype != "F32":
        raise CorruptionError(f"a residual of shape {found.spec.shape} as {found.spec.dtype}")
    return decode_array(found, threads=1, max_bytes=spec.n_bytes)
