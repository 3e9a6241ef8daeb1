"""Codec `bound`, versions 2 and 3: whole numbers that somebody else has rounded to, times steps.

A weight is q · step, computed in float32 and cast to the dtype. The steps are those of the columns,
or of the rows: the input channels, for a method that rounds by what experts see
(`methods/calibrated.py`). In version 3 the other side, the outputs, has factors that steps are
multiplied by. All else is version 1's: alphabet, classes, tables, segments, and the
kernels that decode them.

The widest step follows from the bound ε, κ/2 times it being ε, so that the envelope says how far
any weight is off; the others are levels below it, and each weight keeps κ/2 times its own step.
What does not, after the cast, and what is not finite, goes to the envelope's exact patch.
docs/format.md, sections 4.7 and 4.8, has every byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebound import _native
from moebound.codec import envelope
from moebound.codec.api import Encoded, certified
from moebound.codec.arrays import dtype_name
from moebound.codec.base import ArraySpec, Payload
from moebound.codec.bound import (
    DTYPE_CODES,
    EXACT,
    FACTORS_VERSION,
    MAX_SEGMENT_WEIGHTS,
    SCALED,
    SCALED_VERSION,
    BoundCodec,
    or_exact,
)
from moebound.codec.checks import whole
from moebound.codec.envelope import Envelope
from moebound.codec.lossless import SEGMENT_WEIGHTS
from moebound.errors import CodecError, CorruptionError
from moebound.types import Array, ErrorBound

MOST_LEVEL = 255
MOST_COLUMNS = 1 << 16
LEAST_KAPPA, MOST_KAPPA = 1, 16

Levels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a matrix, but for the bound that the widest has.

    levels: [N], of each column, counted down from the widest step, four to a factor of 2. kappa: κ,
    half steps that a weight may be off, 1 to 16, a number of float16. by_row: they are the rows'.
    factor_levels: of the other side, each row or column, counted down from a factor of 1 in the
    same way; None for none.
    """

    levels: Levels
    kappa: float
    by_row: bool = False
    factor_levels: Levels | None = None

    def __post_init__(self) -> None:
        kappa = float(np.float16(self.kappa))
        if not LEAST_KAPPA <= kappa <= MOST_KAPPA or kappa != self.kappa:
            raise CodecError(
                f"{self.kappa} half steps: expected {LEAST_KAPPA} to {MOST_KAPPA}, of float16"
            )

    def sizes(self, abs_bound: float) -> npt.NDArray[np.float32]:
        """[N] the steps, the same on every machine. Raises CodecError where one, times the least
        factor, is not a normal number of float32."""
        return self._native(abs_bound)[0]

    def of_weights(self, abs_bound: float) -> npt.NDArray[np.float32]:
        """The step of each weight, factors in it: [1, N] or [N, 1], or of the matrix's shape where
        there are factors. Raises as `sizes`."""
        sizes, factors = self._native(abs_bound)
        return _of_weights(sizes, factors, self.by_row)

    def _native(self, abs_bound: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        try:
            return _native.bound_steps(  # type: ignore[no-any-return]
                self.levels, self.factors_or_none, self._kappa_bits, abs_bound
            )
        except ValueError as error:
            raise CodecError(f"bound {abs_bound:g}: {error}") from None

    @property
    def factors(self) -> npt.NDArray[np.float32]:
        """Of the other side; empty for none."""
        return self._native(1.0)[1]

    @property
    def factors_or_none(self) -> Levels:
        """Their levels; empty for none."""
        return np.empty(0, np.uint8) if self.factor_levels is None else self.factor_levels

    @property
    def _kappa_bits(self) -> int:
        return int(np.float16(self.kappa).view(np.uint16))


def encode_codes(
    array: Array,
    codes: npt.NDArray[np.int32],
    steps: Steps,
    bound: ErrorBound,
    abs_bound: float,
    *,
    segment_weights: int = SEGMENT_WEIGHTS,
    threads: int = 1,
) -> Encoded:
    """A matrix as the codes that it was rounded to: an envelope of codec `bound`, with certificate.

    array: [rows, cols], C-contiguous. codes: of the same shape. abs_bound: ε, what `bound` is in
    weight units. segment_weights: as of `BoundCodec`.

    Guarantee: every value decodes to the cast of code · step, and is within κ/2 steps of the
    array's, or comes back bit for bit. Raises CodecError for shapes that do not fit each other, and
    as `Steps`.
    """
    sides = array.shape if array.ndim == 2 else (-1, -1)
    factors = steps.factor_levels
    if (
        codes.shape != array.shape
        or steps.levels.shape != (sides[not steps.by_row],)
        or (factors is not None and factors.shape != (sides[steps.by_row],))
    ):
        others = "" if factors is None else f" and {factors.shape} of the other side"
        raise CodecError(
            f"codes {codes.shape} and {steps.levels.shape} levels{others} of a matrix "
            f"{array.shape}: expected the same shape, and one level for each "
            f"{'row' if steps.by_row else 'column'}"
        )
    if not array.size or array.shape[1] > MOST_COLUMNS:
        raise CodecError(f"shape {array.shape}: expected 1 to {MOST_COLUMNS} columns, and a row")
    steps.sizes(abs_bound)
    dtype = dtype_name(array.dtype)
    spec = ArraySpec(array.shape, dtype, dtype, abs_bound)
    flat = array.reshape(-1)
    data, misses = _native.bound_encode_scaled(
        flat.view(np.uint16) if dtype == "BF16" else flat,
        np.ascontiguousarray(codes, np.int32).reshape(-1),
        steps.levels,
        steps.factors_or_none,
        steps._kappa_bits,
        steps.by_row,
        DTYPE_CODES[dtype],
        abs_bound,
        array.shape[1],
        whole(segment_weights, "segment_weights", 1, MAX_SEGMENT_WEIGHTS),
        threads,
    )
    payload = or_exact(Payload(data, misses), array, spec, threads)
    version = SCALED_VERSION if factors is None else FACTORS_VERSION
    if payload.data[0] == EXACT:
        version = BoundCodec.version
    values = flat[payload.misses.astype(np.int64)]
    envelope_bytes = envelope.build(
        Envelope(
            spec, BoundCodec.id, version, memoryview(payload.data), payload.misses, values
        )
    )  # fmt: skip
    return certified(array, bound, envelope_bytes, threads=threads)


def _of_weights(
    sizes: npt.NDArray[np.float32], factors: npt.NDArray[np.float32], by_row: bool
) -> npt.NDArray[np.float32]:
    own = sizes[:, None] if by_row else sizes[None]
    if not len(factors):
        return own
    return own * (factors[None] if by_row else factors[:, None])


@dataclass(frozen=True, eq=False)
class FoundSteps:
    """The steps in an envelope. sizes: [N] float32, of its columns, or of its rows if by_row.
    factors: of the other side, empty for none. A weight is at most κ/2 times its own step from the
    original."""

    sizes: npt.NDArray[np.float32]
    factors: npt.NDArray[np.float32]
    kappa: float
    by_row: bool

    def of_weights(self) -> npt.NDArray[np.float32]:
        """As `Steps.of_weights`."""
        return _of_weights(self.sizes, self.factors, self.by_row)


def steps_in(parsed: Envelope) -> FoundSteps | None:
    """The steps in an envelope; None if it has none. Raises CorruptionError."""
    payload, spec = parsed.payload, parsed.spec
    if parsed.codec != BoundCodec.id or not len(payload) or payload[0] < SCALED:
        return None
    codes = DTYPE_CODES[spec.source_dtype], DTYPE_CODES[spec.dtype]
    try:
        found = _native.bound_plan(payload, spec.size, *codes, spec.abs_bound)
    except _native.Corrupt as error:
        raise CorruptionError(f"bound: {error}") from None
    own, factors, by_row = found["steps"], found["factors"], bool(found["by_row"])
    if len(spec.shape) != 2 or len(own) != spec.shape[0 if by_row else 1]:
        raise CorruptionError(f"bound: {len(own)} steps of a matrix {spec.shape}")
    return FoundSteps(own, factors, float(np.uint16(found["kappa"]).view(np.float16)), by_row)
