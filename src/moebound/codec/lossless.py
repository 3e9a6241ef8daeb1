"""`lossless`: the same bits back. Exponents are entropy-coded, signs and mantissas as they are.

The mantissas of trained weights are noise, their exponents are not: about 2.6 of bf16's 8 exponent
bits are information, so about 10.6 of 16 bits remain (ZipNN, arXiv:2411.05239; DFloat11,
arXiv:2504.11651). A float32 is its upper half, coded like a bfloat16, and its lower half as it is.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moebound import _native
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.shape import columns_of
from moebound.errors import CodecError, CorruptionError
from moebound.types import Array

SEGMENT_WEIGHTS = 1 << 18
MAX_WEIGHTS = (1 << 32) - 1
_BF16 = 0


class LosslessCodec(Codec):
    """Keeps every bit of the values in the decoded dtype."""

    id: ClassVar[str] = "lossless"
    lossy: ClassVar[bool] = False

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """At least 8 bits of a value are stored as they are."""
        return n_bytes

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        if spec.size > MAX_WEIGHTS:
            raise CodecError(f"{spec.size} values in one array: at most {MAX_WEIGHTS}; split it")
        with np.errstate(over="ignore", invalid="ignore"):
            values = x.astype(spec.numpy_dtype, copy=False).reshape(-1)
        halves, rest = values.view(np.uint16), b""
        if spec.dtype == "F32":
            halves, lower = _split(values)
            rest = lower.tobytes()
        data, _ = _native.bound_encode(
            halves, _BF16, 0.0, columns_of(spec.shape), SEGMENT_WEIGHTS, threads
        )
        return Payload(rest + data)

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        n_rest = 2 * spec.size if spec.dtype == "F32" else 0
        if len(data) < n_rest:
            raise CorruptionError(f"lossless: expected {n_rest} bytes or more, found {len(data)}")
        halves = np.empty(spec.size, np.uint16) if n_rest else out.view(np.uint16)
        try:
            _native.bound_decode(data[n_rest:], halves, _BF16, 0.0, threads)
        except _native.Corrupt as error:
            raise CorruptionError(f"lossless: {error}") from None
        if n_rest:
            bits = out.view(np.uint32)
            bits[:] = halves
            bits <<= 16
            bits |= np.frombuffer(data[:n_rest], np.uint16)


def _split(values: Array) -> tuple[Array, Array]:
    """The upper and the lower 16 bits of float32 values."""
    bits = values.view(np.uint32)
    return (bits >> 16).astype(np.uint16), bits.astype(np.uint16)
