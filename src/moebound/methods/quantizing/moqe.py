"""MoQE (Kim et al., 2310.02410), and MoE-CSP (2211.10017): `moqe_re:int4`.

Weights of experts alone, to the nearest of a symmetric grid for each output channel, no data:

    s = 2 max|w| / (2^b - 1),  q = round(w / s)     b from 2 to 8; MoE-CSP has 4 and 8

Stored: a float16 scale for each output channel, integers (`grid.py`): b + 16/N bits a weight.
Reimplemented from notes: the exact rounding is not known for sure. round(w / s) has 2^b + 1 values
where the largest weight stands on either side; it is clipped to -2^(b-1) .. 2^(b-1) - 1. Left out:
the log-scale variant, which the paper finds worse, and the quantization-aware training that it
uses for 2 bits. Its models translate with encoders and decoders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from moebound.codec.envelope import MAX_SIZE
from moebound.errors import MethodError
from moebound.methods.quantizing.grid import Grid, Quantized
from moebound.types import Array

_OPTIONS = re.compile(r"int([2-8])(:coded)?")


@dataclass(frozen=True)
class Moqe(Grid):
    """A payload: `grid.py`, symmetric, one group a row."""

    id: ClassVar[str] = "moqe_re"
    group: int = MAX_SIZE

    @classmethod
    def from_options(cls, options: str) -> Self:
        found = _OPTIONS.fullmatch(options)
        if not found:
            raise MethodError(
                f"method '{cls.id}:{options}': expected integers of int2 to int8, as in "
                f"{cls.id}:int4; then :coded, if the integers are to be entropy-coded. A scale is "
                "of a whole output channel"
            )
        return cls(int(found[1]), coded=bool(found[2]))

    @property
    def setting(self) -> str:
        return f"{self.id}:int{self.bits}" + (":coded" if self.coded else "")

    def fitted(self, matrix: Array, moments: Array | None) -> Quantized:
        largest = np.abs(matrix).max(axis=1, keepdims=True, initial=0)
        with np.errstate(over="ignore"):
            scale = (2 * largest / np.float32(2**self.bits - 1)).astype(np.float16)
        step = np.where(scale > 0, scale, 1).astype(np.float32)
        middle = 1 << (self.bits - 1)
        codes = np.clip(np.rint(matrix / step) + middle, 0, 2 * middle - 1).astype(np.uint8)
        return Quantized(codes, scale)
