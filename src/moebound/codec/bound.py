"""`bound`: our own codec. A covering quantizer, then rANS in row and column classes.

    grid     the fewest values of the output dtype whose cells [v - ε, v + ε] cover every number of
             the source dtype (native/bound/grid.h): so the bound holds after the cast
    classes  rows and columns grouped by scale, a frequency table for each combined class
    rANS     static, 12-bit, 32 interleaved lanes, independent segments of whole rows
    misses   NaN, ±Inf and rare values far outside the rest go to the envelope's exact patch

Version 2 is the same stream, of whole numbers that somebody else has rounded to, each times a step
of its column or row (`scaled.py`).

For a strict maximum error this is next to the best there is: the cube of side 2ε tiles space, so a
uniform quantizer with ideal entropy coding has no shaping gain left to chase. docs/format.md,
section 4, describes every byte; reference/ is the same in NumPy, to be read.
"""

from __future__ import annotations

import re
from typing import ClassVar, Self

import numpy as np

from moebound import _native
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.checks import whole
from moebound.codec.lossless import MAX_WEIGHTS, SEGMENT_WEIGHTS, LosslessCodec
from moebound.codec.shape import columns_of
from moebound.errors import CodecError, CorruptionError
from moebound.types import Array, DType

DTYPE_CODES: dict[DType, int] = {"BF16": 0, "F16": 1, "F32": 2}
MAX_SEGMENT_WEIGHTS = 1 << 18
SEGMENTS = {"size": SEGMENT_WEIGHTS, "gpu": 1 << 14}
"""Names for weights of a segment: the smallest streams, or many warps at 0.05 bit a weight more."""
_NUMBER = re.compile(r"[0-9]{1,9}")
EXACT = 0
"""First byte of a payload that is an exact copy; otherwise it is the tables' log2, 1 to 12, or
SCALED."""


SCALED = 128
"""First byte of a payload of version 2 or 3, or more: its flags."""
SCALED_VERSION, FACTORS_VERSION = 2, 3
FACTORS = SCALED | 8
"""Flags of a payload whose steps have factors: both bits."""


class BoundCodec(Codec):
    """The bound on every weight, next to the entropy limit, near memory speed.

    segment_weights: weights that decode together, one thread or GPU warp each. Fewer make more
    parallelism and cost 96 bytes a segment; SEGMENTS has names for two sizes.
    """

    id: ClassVar[str] = "bound"
    keeps_bound: ClassVar[bool] = True

    def __init__(self, *, segment_weights: int = SEGMENT_WEIGHTS) -> None:
        self.segment_weights = whole(
            segment_weights, "bound: segment_weights", 1, MAX_SEGMENT_WEIGHTS
        )

    @classmethod
    def from_options(cls, options: str) -> Self:
        """``segment=N``, ``segment=gpu``, ``segment=size`` or nothing."""
        if not options:
            return cls()
        name, _, value = options.partition("=")
        if name != "segment" or not (_NUMBER.fullmatch(value) or value in SEGMENTS):
            names = " or ".join(SEGMENTS)
            raise CodecError(
                f"codec 'bound': expected segment=WEIGHTS ({names}), found {options!r}"
            )
        return cls(segment_weights=SEGMENTS.get(value) or int(value))

    @classmethod
    def newest(cls) -> int:
        """Version 2 has steps, version 3 factors, too: `codec.scaled` writes both."""
        return FACTORS_VERSION

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """A segment of at most 2^18 weights has a state of 4 bytes at least."""
        return n_bytes // 4 * MAX_SEGMENT_WEIGHTS

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        if spec.size > MAX_WEIGHTS:
            raise CodecError(f"{spec.size} values in one array: at most {MAX_WEIGHTS}; split it")
        flat = x.reshape(-1)
        if spec.source_dtype == "BF16":
            flat = flat.view(np.uint16)
        data, misses = _native.bound_encode(
            flat,
            DTYPE_CODES[spec.dtype],
            spec.abs_bound,
            columns_of(spec.shape),
            self.segment_weights,
            threads,
        )
        return or_exact(Payload(data, misses), x, spec, threads)

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        if len(data) and data[0] == EXACT:
            LosslessCodec().decompress(data[1:], spec, out, threads=threads)
            return
        if spec.abs_bound <= 0:
            raise CorruptionError("bound: a bound of 0 in a payload that is no exact copy")
        try:
            _native.bound_decode(
                data,
                out.view(np.uint16) if spec.dtype == "BF16" else out,
                DTYPE_CODES[spec.source_dtype],
                spec.abs_bound,
                threads,
            )
        except _native.Corrupt as error:
            raise CorruptionError(f"bound: {error}") from None

    def __repr__(self) -> str:
        return f"BoundCodec(segment_weights={self.segment_weights})"


def or_exact(payload: Payload, x: Array, spec: ArraySpec, threads: int) -> Payload:
    """An exact copy instead, where the bound is so tight that it is smaller."""
    if not may_be_exact(payload, spec):
        return payload
    exact = LosslessCodec().compress(x, spec, threads=threads)
    if len(exact.data) + 1 >= _kept_bytes(payload, spec):
        return payload
    return Payload(bytes([EXACT]) + exact.data)


def may_be_exact(payload: Payload, spec: ArraySpec) -> bool:
    """Whether a payload is so large that an exact copy may be smaller."""
    item_bits = 8 * spec.numpy_dtype.itemsize
    too_large = 8 * _kept_bytes(payload, spec) >= 0.6 * item_bits * spec.size
    return spec.dtype == spec.source_dtype and too_large


def _kept_bytes(payload: Payload, spec: ArraySpec) -> int:
    """With what a miss costs, about."""
    return len(payload.data) + len(payload.misses) * (spec.numpy_dtype.itemsize + 1)
