"""Rounding with regard to the inputs, under a bound on every weight: `calibrated`.

Of each matrix W [out, in], with H the second moments of its inputs on a calibration text
(`moebound calibrate`), column by column in the order of falling H_jj:

  step      Δ_j in proportion to 1/L_jj, L the Cholesky factor of H in that order (WaterSIC, ICML
            2026), rounded to quarters of an octave
  rounding  to a whole number of steps, the errors of earlier columns made good (`feedback.py`), no
            weight by more than ε_j = κ Δ_j / 2; the largest ε_j is the bound that was asked
  coding    the whole numbers and the steps as codec `bound`, version 2 (`codec/scaled.py`): what is
            written are envelopes of that codec. Blobs with a payload of this method's own, which
            were written before, decode for ever.

By statistics of `calibrate --fisher` the steps of a row are narrower, too, the more the loss feels
of it: Δ_ij = Δ_j r_i^(-1/2), r_i of `shrinkage.py`. That is of gate and up; what down gives weighs
alike everywhere (docs/log.md). The payload is then codec `bound`'s version 3.

H is that of an expert shrunk toward its layer's (`shrinkage.py`), which an expert that no token
reached has whole. Weights whose cast to the model's dtype leaves ε_j, and those that are not
finite, are stored verbatim. Where only the diagonal of H is known, steps follow it (Δ_j in
proportion to H_jj^(-1/2)) and every weight goes to the nearest.

What is promised is the bound, whatever the text. That the outputs are near is measured, on text.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from moebound.checkpoint import Role
from moebound.checkpoint.families import HALVES
from moebound.codec import Encoded, Envelope, Steps, encode_codes, stats, steps_in
from moebound.codec.bound import FACTORS_VERSION, SCALED_VERSION
from moebound.codec.fields import FieldReader
from moebound.codec.patch import positions_n_bytes, unpack_positions
from moebound.errors import CodecError, CorruptionError, MethodError
from moebound.files.formats.statistics import Side
from moebound.methods.base import (
    ColumnBounds,
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Method,
)
from moebound.methods.blob import MatrixBlob
from moebound.methods.bounded import reference
from moebound.methods.geometry import OCTAVE, Geometry, row_levels
from moebound.methods.one_thread import one_thread
from moebound.methods.outputs import side_of, turned
from moebound.methods.packing import packed_bytes, uncode, unpack
from moebound.methods.shrinkage import FISHER_RULE, RULE
from moebound.types import NUMPY_DTYPES, Array, ErrorBound

KAPPA = 2.0
_OPTIONS = re.compile(r"k(\d+(?:\.\d+)?)")
_QUARTERS = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
_LARGEST = 1 << 20
"""Codes beyond make a step too small for the float32 they are computed in."""
_HEAD = struct.Struct("<BffB")
"""Of a blob's payload: flags, κ, the smallest step, bits of a level."""


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
        return cls(float(np.float16(kappa)))  # as envelopes have it

    @property
    def setting(self) -> str:
        return self.id if self.kappa == KAPPA else f"{self.id}:k{self.kappa:g}"

    @property
    def needs_bound(self) -> bool:
        return True

    @property
    def versions(self) -> tuple[int, ...]:
        return (self.version, SCALED_VERSION, FACTORS_VERSION)

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        fisher = "down_rows" in group.statistics
        damping = (FISHER_RULE if fisher else RULE).least_damping
        with one_thread():
            geometry = {
                expert.key: {
                    side: Geometry.of(group.statistics[side][expert.key], damping)
                    for side in sorted({side_of(role) for role in expert.matrices})
                }
                for expert in group.experts
            }
            found = {
                e.key: self._expert(e, geometry[e.key], row_weights(group, e) if fisher else {})
                for e in group.experts
            }
        return Encoding(found, geometry=geometry)

    def _expert(
        self, expert: ExpertView, geometry: Mapping[Side, Geometry], rows: Mapping[Role, Array]
    ) -> dict[Role, Encoded]:
        if expert.bounds is None:
            raise MethodError(f"{expert.key}: no bound was given")
        whole = reference(expert.matrices, expert.bounds)
        found: dict[Role, Encoded] = {}
        for role, array in expert.matrices.items():
            bound = expert.bounds[role]
            if not bound.pointwise:
                raise MethodError(f"bound {bound}: an average promise; expected one on each weight")
            own = whole if whole is not None and bound.scope == "expert" else stats(array)
            epsilon = bound.absolute(own)
            columns = geometry[side_of(role)]
            transposed = turned(array, len(columns.levels), role in expert.transposed)
            found[role] = self._matrix(array, transposed, columns, bound, epsilon, rows.get(role))
        return found

    def _matrix(
        self, array: Array, transposed: bool, geometry: Geometry, bound: ErrorBound, epsilon: float,
        rows: Array | None,
    ) -> Encoded:  # fmt: skip
        import torch

        from moebound.methods.feedback import round_with_feedback

        original = array.astype(np.float64)
        weights = original.T if transposed else original
        if weights.shape[1] != len(geometry.levels):
            raise MethodError(
                f"inputs of {weights.shape[1]} channels, and statistics of "
                f"{len(geometry.levels)}; expected statistics of this model"
            )
        levels = (geometry.levels.max() - geometry.levels).astype(np.uint8)
        kappa = float(np.float16(self.kappa))
        steps = Steps(levels, kappa, transposed, None if rows is None else row_levels(rows)[0])
        try:
            sizes = steps.sizes(epsilon)
        except CodecError as error:
            raise MethodError(f"{error}; it is too small for steps in float32") from None
        plain = np.where(np.isfinite(weights), weights, 0.0)
        if rows is not None:  # rows in units of their factors
            plain = plain / steps.factors[:, None].astype(np.float64)
        if np.abs(plain / sizes).max(initial=0.0) > _LARGEST:
            raise MethodError(
                f"bound {epsilon:g} is {np.abs(plain).max() / epsilon:.0f} times below the largest "
                "weight; take method bounded:lossless for bounds so small"
            )
        order = geometry.order
        codes = np.empty(weights.shape, np.int32)
        codes[:, order] = round_with_feedback(
            torch.from_numpy(plain.astype(np.float32)[:, order]),
            torch.from_numpy(sizes[order]),
            geometry.upper,
            kappa,
        ).numpy()
        return encode_codes(array, codes.T if transposed else codes, steps, bound, epsilon)

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

    def column_bounds(self, found: MatrixBlob | Envelope) -> ColumnBounds | None:
        if not isinstance(found, MatrixBlob):
            scaled = steps_in(found)  # None of an exact copy
            if scaled is None:
                return None
            factors = scaled.factors if len(scaled.factors) else None
            return ColumnBounds(scaled.sizes, scaled.kappa / 2, scaled.by_row, factors)
        parts = _Parts.of(found.payload, MatrixSpec(found.shape, found.dtype))
        return ColumnBounds(_steps(parts.base, parts.levels), parts.kappa / 2, parts.transposed)

    @classmethod
    def verbatim(cls, payload: memoryview, spec: MatrixSpec) -> int:
        return len(_Parts.of(payload, spec).verbatim)


def row_weights(group: GroupView, expert: ExpertView) -> dict[Role, Array]:
    """The Fisher weights of the rows of gate and up: of matrices of an expert that are one of them,
    or both."""
    found: dict[Role, Array] = {}
    for role in expert.matrices:
        parts = HALVES.get(role, (role,))
        if role != "down":
            rows = [group.statistics[f"{part}_rows"][expert.key] for part in parts]
            whole = np.stack(rows, -1).reshape(-1) if expert.interleaved else np.concatenate(rows)
            found[role] = whole[expert.outputs.get(role, slice(None))]
    return found


@dataclass(frozen=True, eq=False)
class _Parts:
    """A payload, taken apart: docs/format-method.md, section 5."""

    transposed: bool
    kappa: float
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
        codes = read.take(read.left)
        return cls(bool(flags), kappa, np.float32(base), levels, positions, verbatim, codes)


def _steps(base: np.float32, levels: Array) -> Array:
    """[N] float32, of a blob, the same on every machine: products of one rounding each."""
    octaves, quarters = np.divmod(levels, OCTAVE)
    factors = np.ldexp(np.array(_QUARTERS)[quarters], octaves)
    steps: Array = (np.float64(base) * factors).astype(np.float32)
    return steps
