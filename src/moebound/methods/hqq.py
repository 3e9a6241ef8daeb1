"""Half-Quadratic Quantization (Badri and Shaji, 2023) by its own library: `hqq:int4:g64`.

As `hqq` quantizes by default (axis 1), with a float16 scale and a float16 zero point for each
group: 4 + 32/64 bits a weight. The library is needed to encode; decoding does without it. No bound
is known: what it leaves is measured, not promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from moebound.errors import MethodError
from moebound.extras import need
from moebound.methods.base import MatrixSpec
from moebound.methods.rtn import Grouped, take_groups
from moebound.types import Array

_WIDTHS = (2, 3, 4, 5, 6, 8)


class Hqq(Grouped):
    """A payload: head, scales, zero points (float16 each), integers."""

    id: ClassVar[str] = "hqq"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("hqq",)

    def quantized(self, matrix: Array) -> bytes:
        if self.bits not in _WIDTHS:
            raise MethodError(f"{self.setting}: hqq has integers of 2 to 6 bits, and of 8")
        if matrix.size % self.group:
            raise MethodError(
                f"a matrix of {matrix.size} weights is not a whole number of groups of "
                f"{self.group}, which hqq asks for"
            )
        codes, meta = need("hqq.core.quantize", "method hqq").Quantizer.quantize(
            torch.from_numpy(matrix), nbits=self.bits, group_size=self.group, axis=1, device="cpu",
            bitpack=False, compute_dtype=torch.float16,
        )  # fmt: skip
        scale, zero = (meta[name].numpy().astype("<f2").tobytes() for name in ("scale", "zero"))
        own = codes.reshape(matrix.shape).to(torch.uint8).numpy()
        parts: tuple[bytes, ...] = bytes(self.head()), scale, zero, self.write_codes(own)
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        return take_groups(payload, spec)
