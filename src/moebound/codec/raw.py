"""`raw`: the values as they are, little-endian. The yardstick, and the fallback."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.errors import CorruptionError
from moebound.types import Array


class RawCodec(Codec):
    """Stores values of the decoded dtype uncompressed."""

    id: ClassVar[str] = "raw"
    lossy: ClassVar[bool] = False

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        return n_bytes // 2

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        with np.errstate(over="ignore", invalid="ignore"):
            return Payload(x.astype(spec.numpy_dtype, copy=False).tobytes())

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        if len(data) != out.nbytes:
            raise CorruptionError(f"raw: expected {out.nbytes} bytes, found {len(data)}")
        out[:] = np.frombuffer(data, out.dtype)
