"""Patterns and numbers: what the bits of BF16, F16 and F32 mean.

All three are a sign, an exponent and a mantissa. Without the sign, patterns as integers are ordered
as the numbers they stand for, zero and denormals included: the next number is the next integer.
That makes every search over numbers a search over integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ldexp

import numpy as np
import numpy.typing as npt

from moebound.types import DType

Patterns = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class NumberFormat:
    """An IEEE-like binary format of n_bits, mantissa_bits of them below the exponent."""

    n_bits: int
    mantissa_bits: int

    @cached_property
    def sign(self) -> int:
        """The sign bit's pattern."""
        return 1 << (self.n_bits - 1)

    @cached_property
    def largest(self) -> int:
        """The pattern of the largest finite number: one below that of infinity."""
        return self.sign - (1 << self.mantissa_bits) - 1

    @cached_property
    def smallest_exponent(self) -> int:
        """The power of two that a mantissa counts, in zero, denormals and the first normals."""
        exponent_bits = self.n_bits - 1 - self.mantissa_bits
        return 2 - (1 << (exponent_bits - 1)) - self.mantissa_bits

    @property
    def bits_dtype(self) -> np.dtype[np.unsignedinteger]:
        return np.dtype(np.uint16 if self.n_bits == 16 else np.uint32)

    def value(self, pattern: int) -> float:
        """The number that a pattern without a sign stands for, exact in float64."""
        exponent, leading_one = pattern >> self.mantissa_bits, 1 << self.mantissa_bits
        mantissa = pattern & (leading_one - 1)
        if exponent == 0:  # zero and denormals
            return ldexp(mantissa, self.smallest_exponent)
        return ldexp(mantissa | leading_one, self.smallest_exponent + exponent - 1)


FORMATS: dict[DType, NumberFormat] = {
    "BF16": NumberFormat(16, 7),
    "F16": NumberFormat(16, 10),
    "F32": NumberFormat(32, 23),
}
