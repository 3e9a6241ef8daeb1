"""The judge: what is the error, really? Separate from every codec, in float64, after the cast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moebound import _native
from moebound.codec.base import Positions
from moebound.types import Array, TensorStats


@dataclass(frozen=True)
class Distortion:
    """How far decoded values are from the original ones.

    max_abs_error, rmse: over the finite originals, in weight units, computed in float64.
    broken: how many values break the bound. A non-finite original must come back with the same
    bits; +0.0 and -0.0 are the same value.
    """

    max_abs_error: float
    rmse: float
    broken: int


def measure(original: Array, decoded: Array, abs_bound: float) -> Distortion:
    """Compare two contiguous arrays of the same shape, of dtypes BF16, F16 or F32 each."""
    worst, square_sum, count, broken = _native.compare(_flat(original), _flat(decoded), abs_bound)
    return Distortion(worst, math.sqrt(square_sum / count) if count else 0.0, broken)


def violations(original: Array, decoded: Array, abs_bound: float) -> Positions:
    """Flat positions, ascending, of the values that break the bound; the rule is `measure`'s."""
    return _native.violations(_flat(original), _flat(decoded), abs_bound)


def stats(array: Array) -> TensorStats:
    """Statistics of the finite values of a contiguous array."""
    return TensorStats(*_native.stats(_flat(array)))


def _flat(array: Array) -> Array:
    flat = array.reshape(-1)
    if flat.dtype.itemsize == 2 and flat.dtype != np.float16:
        # The binding layer knows no bfloat16: it travels as its bits.
        return flat.view(np.uint16)
    return flat
