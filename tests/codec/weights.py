"""Arrays to try codecs on, and the judge in plain NumPy that every codec answers to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moebound.types import NUMPY_DTYPES, Array, DType

DTYPES: tuple[DType, ...] = ("BF16", "F16", "F32")
BITS: dict[DType, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.uint16),
    "F32": np.dtype(np.uint32),
}


def gaussian(
    shape: tuple[int, ...], dtype: DType = "BF16", *, seed: int = 0, scale: float = 0.02
) -> Array:
    """Weights as an untrained layer has them."""
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(NUMPY_DTYPES[dtype])


def every_pattern(dtype: DType) -> Array:
    """[256, 256] all bit patterns of a 16-bit dtype."""
    return np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPES[dtype]).reshape(256, 256)


def bits(array: Array) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def broken(original: Array, decoded: Array, bound: float) -> npt.NDArray[np.intp]:
    """Flat positions that break the bound, in float64, one rule a line, no native code."""
    with np.errstate(invalid="ignore", over="ignore"):
        x, y = original.astype(np.float64).reshape(-1), decoded.astype(np.float64).reshape(-1)
        near = np.abs(x - y) <= bound
    same = bits(original) == bits(decoded)
    return np.flatnonzero(np.where(np.isfinite(x), near, same) == 0)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Any dtype, 0-d to 4-d, empty sides too: any bits at all, or weights with oddities."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    if draw(st.booleans()):
        n_bits = 8 * BITS[dtype].itemsize
        # hypothesis fills most of a large array with one value: constant runs come for free.
        pattern = hnp.arrays(BITS[dtype], shape, elements=st.integers(0, (1 << n_bits) - 1))
        return np.asarray(draw(pattern)).view(NUMPY_DTYPES[dtype])
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    values = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-44, 37))
    odd = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -6e-8, 65504.0, 3.38e38]
    chosen = draw(st.lists(st.sampled_from(odd), max_size=4))
    for value in chosen:
        values = np.where(rng.random(shape) < 0.1, value, values)
    if draw(st.booleans()) and values.size:
        values = np.full(shape, values.reshape(-1)[0])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(values).astype(NUMPY_DTYPES[dtype])


bounds = st.one_of(
    st.floats(-3, 1).map(lambda e: 10.0**e),
    st.floats(-46, 39).map(lambda e: 10.0**e),
    st.sampled_from([5e-324, 1e308]),
)


def scaled_both_ways(shape: tuple[int, int], dtype: DType = "BF16", spread: float = 0.5) -> Array:
    """Gaussian weights whose rows and columns have scales of their own, spread in e-foldings."""
    rng = np.random.default_rng(8)
    values = rng.standard_normal(shape) * 0.02
    values *= np.exp(spread * rng.standard_normal((shape[0], 1)))
    values *= np.exp(spread * rng.standard_normal(shape[1]))
    return values.astype(NUMPY_DTYPES[dtype])
