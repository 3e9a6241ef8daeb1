"""Rounding with regard to the inputs, under a bound on every weight: `calibrated`.

Of each matrix W [out, in], with H the second moments of its inputs on a calibration text
(`moebound calibrate`), column by column in the order of falling H_jj:

  step      Δ_j in proportion to 1/L_jj, L the Cholesky factor of H in that order (WaterSIC, ICML
            2026), rounded to quarters of an octave
  rounding  to a whole number of steps, the errors of earlier columns made good (`feedback.py`), no
            weight by more than ε_j = κ Δ_j / 2; the largest ε_j is the bound that was asked
  coding    the whole numbers as an array of codec `bound`, entropy-coded by rows and columns

Weights whose cast to the model's dtype leaves ε_j, and those that are not finite, are stored
verbatim. Where only the diagonal of H is known, steps follow it (Δ_j in proportion to H_jj^(-1/2))
and every weight goes to the nearest. An expert that no token reached is rounded plainly.

What is promised is the bound, whatever the text. That the outputs are near is measured, on text.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from moebound.checkpoint import Role
from moebound.codec import stats
from moebound.codec.fields import FieldReader, put_varint
from moebound.codec.patch import pack_positions, positions_n_bytes, unpack_positions
from moebound.errors import CorruptionError, MethodError
from moebound.methods.base import Encoding, ExpertView, GroupView, MatrixSpec, Method, Payload
from moebound.methods.bounded import reference
from moebound.methods.one_thread import one_thread
from moebound.methods.packing import code, pack, packed_bytes, uncode, unpack
from moebound.types import NUMPY_DTYPES, Array, ErrorBound

KAPPA = 2.0
_OPTIONS = re.compile(r"k(\d+(?:\.\d+)?)")
_OCTAVE = 4
"""Steps are base · 2^(k/4): 8 of them are exact, and no machine rounds the others otherwise."""
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
_WIDEST = 8 * _OCTAVE
"""Steps of a matrix differ by at most eight octaves; columns beyond get less than they could."""
_HALF = 0.49
"""The bound that the codes are encoded with."""
_LARGEST = 1 << 20
"""Codes beyond make a step too small for the float32 they are computed in."""
_HEAD = struct.Struct("<BffB")


@dataclass(frozen=True)
class Calibrated(Method):
    """kappa κ: how many half steps a weight may move; at 1 there is no feedback."""

    id: ClassVar[str] = "calibrated"
    takes_bound: ClassVar[bool] = True
    statistics: ClassVar[frozenset[str]] = frozenset({"inputs", "hidden"})
    kappa: float = KAPPA

    @classmethod
    def from_options(cls, options: str) -> Self:
        if not options:
            return cls()
        found = _OPTIONS.fullmatch(options)
        kappa = float(found[1]) if found else 0.0
        if not 1 <= kappa <= 16:
            raise MethodError(
                f"method 'calibrated:{options}': expected the half steps that a weight may move, "
                "1 to 16, as in calibrated:k2"
            )
        return cls(kappa)

    @property
    def setting(self) -> str:
        return self.id if self.kappa == KAPPA else f"{self.id}:k{self.kappa:g}"

    @property
    def needs_bound(self) -> bool:
        return True

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        with one_thread():
            return Encoding({e.key: self._expert(e, group) for e in group.experts})

    def _expert(self, expert: ExpertView, group: GroupView) -> dict[Role, Payload]:
        if expert.bounds is None:
            raise MethodError(f"{expert.key}: no bound was given")
        whole = reference(expert.matrices, expert.bounds)
        geometry: dict[str, _Geometry] = {}
        found: dict[Role, Payload] = {}
        for role, array in expert.matrices.items():
            bound = expert.bounds[role]
            if not bound.pointwise:
                raise MethodError(f"bound {bound}: an average promise; expected one on each weight")
            side = "hidden" if role == "down" else "inputs"
            if side not in geometry:
                geometry[side] = _Geometry.of(group.statistics[side][expert.key])
            own = whole if whole is not None and bound.scope == "expert" else stats(array)
            epsilon = bound.absolute(own)
            n = len(geometry[side].levels)
            by_shape = array.shape[1] != n and array.shape[0] == n  # of families that have both
            transposed = role in expert.transposed or by_shape
            found[role] = self._matrix(array, transposed, geometry[side], bound, epsilon)
        return found

    def _matrix(
        self, array: Array, transposed: bool, geometry: _Geometry, bound: ErrorBound, epsilon: float
    ) -> Payload:
        import torch

        from moebound.methods.feedback import round_with_feedback

        original = array.astype(np.float64)
        weights = original.T if transposed else original
        if weights.shape[1] != len(geometry.levels):
            raise MethodError(
                f"inputs of {weights.shape[1]} channels, and statistics of "
                f"{len(geometry.levels)}; expected statistics of this model"
            )
        finite = np.isfinite(weights)
        # The widest step is such that the bound asked is the widest bound of a column.
        widest = geometry.levels.max()
        base = np.float32(2 * epsilon / self.kappa / 2.0 ** (widest / _OCTAVE))
        while _steps(base, geometry.levels).max() * self.kappa / 2 > epsilon and base > 0:
            base = np.nextafter(base, np.float32(0))
        steps = _steps(base, geometry.levels)
        if not steps.min() > np.finfo(np.float32).tiny:
            raise MethodError(f"bound {epsilon:g} is too small for steps in float32")
        plain = np.where(finite, weights, 0.0)
        if np.abs(plain / steps).max(initial=0.0) > _LARGEST:
            raise MethodError(
                f"bound {epsilon:g} is {np.abs(plain).max() / epsilon:.0f} times below the largest "
                "weight; take method bounded:lossless for bounds so small"
            )
        order = geometry.order
        codes = np.empty(weights.shape, np.float32)
        codes[:, order] = round_with_feedback(
            torch.from_numpy(plain.astype(np.float32)[:, order]),
            torch.from_numpy(steps[order]),
            geometry.upper,
            self.kappa,
        ).numpy()
        codes = np.ascontiguousarray(codes.T if transposed else codes)
        by_column = steps[:, None] if transposed else steps
        decoded = (codes * by_column).astype(array.dtype)
        with np.errstate(invalid="ignore"):
            kept = np.abs(original - decoded.astype(np.float64)) <= (
                by_column.astype(np.float64) * (self.kappa / 2)
            )
        misses = np.flatnonzero(~kept)
        out = bytearray(_HEAD.pack(int(transposed), self.kappa, base, geometry.bits))
        if geometry.bits:
            out += pack(geometry.levels.astype(np.uint8), geometry.bits)
        put_varint(out, len(misses))
        if len(misses):
            out += pack_positions(misses.astype(np.uint64), array.size)
            out += array.reshape(-1)[misses].tobytes()
        out += code(codes, _HALF)
        return Payload(bytes(out), promise=bound, abs_bound=epsilon, patched=len(misses))

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        found = _Parts.of(payload, spec)
        codes = uncode(found.codes, spec.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            steps = _steps(found.base, found.levels)
            weights: Array = codes * (steps[:, None] if found.transposed else steps)
            # The cast of what is verbatim is exact; that of the others is the model's.
            cast = weights.astype(NUMPY_DTYPES[spec.dtype])
        n = len(found.verbatim)
        if n:
            cast.reshape(-1)[unpack_positions(found.positions, spec.size, n)] = found.verbatim
        return cast

    @classmethod
    def verbatim(cls, payload: memoryview, spec: MatrixSpec) -> int:
        return len(_Parts.of(payload, spec).verbatim)


@dataclass(frozen=True, eq=False)
class _Parts:
    """A payload, taken apart: docs/format-method.md, section 5."""

    transposed: bool
    base: np.float32
    levels: Array
    positions: memoryview
    verbatim: Array
    codes: memoryview

    @classmethod
    def of(cls, payload: memoryview, spec: MatrixSpec) -> Self:
        """Raises CorruptionError for what `encode` cannot have written."""
        read = FieldReader(payload, 0)
        flags, kappa, base, bits = _HEAD.unpack(bytes(read.take(_HEAD.size)))
        if flags > 1 or bits > 8 or len(spec.shape) != 2 or not (math.isfinite(base) and base > 0):
            raise CorruptionError(f"flags {flags}, steps of {bits} bits, base {base:g}")
        if not 1 <= kappa <= 16:
            raise CorruptionError(f"half steps {kappa:g}: expected 1 to 16")
        n = spec.shape[0 if flags else 1]
        levels = np.zeros(n, np.int64)
        if bits:
            levels += unpack(read.take(packed_bytes(n, bits)), n, bits)
        n_verbatim, dtype = read.varint(), NUMPY_DTYPES[spec.dtype]
        if n_verbatim > spec.size:
            raise CorruptionError(f"{n_verbatim} weights verbatim of {spec.size}")
        positions = read.take(positions_n_bytes(spec.size, n_verbatim) if n_verbatim else 0)
        verbatim = np.frombuffer(read.take(n_verbatim * dtype.itemsize), dtype)
        return cls(bool(flags), np.float32(base), levels, positions, verbatim, read.take(read.left))


@dataclass(frozen=True, eq=False)
class _Geometry:
    """What H says of the columns. order: [N], in which they are rounded. upper: of `feedback`, in
    that order, torch float64. levels: [N] integers, log2 of each step in quarters of an octave, the
    smallest 0."""

    order: Array
    upper: Any
    levels: Array

    @classmethod
    def of(cls, moments: Array) -> _Geometry:
        import torch

        from moebound.methods.feedback import damped, inverse_factor

        if moments.ndim == 1:
            h = damped(torch.from_numpy(np.diag(moments)))
        else:
            h = damped(torch.from_numpy(np.ascontiguousarray(moments, np.float64)))
        order = h.diagonal().argsort(descending=True, stable=True)
        upper = inverse_factor(h[order][:, order])
        logs = torch.empty(len(h), dtype=torch.float64)
        logs[order] = upper.diagonal().log2()
        levels = (logs * _OCTAVE).round().long().numpy()
        levels = levels - levels.min()
        return cls(order.numpy(), upper, np.minimum(levels, _WIDEST))

    @property
    def bits(self) -> int:
        """Of each level."""
        return int(self.levels.max()).bit_length()


def _steps(base: np.float32, levels: Array) -> Array:
    """[N] float32, the same on every machine: products of one rounding each."""
    octaves, quarters = np.divmod(levels, _OCTAVE)
    factors = np.ldexp(np.array(_QUARTERS)[quarters], octaves)
    steps: Array = (np.float64(base) * factors).astype(np.float32)
    return steps
