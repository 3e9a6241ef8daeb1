"""Sizes without encoding at every bound: within a hundredth of what encode then writes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.codec import encode, estimate_bytes
from moebound.codec.estimate import SAMPLE_WEIGHTS
from moebound.errors import BoundError, CodecError
from moebound.types import NUMPY_DTYPES, Array, DType

from .weights import DTYPES, gaussian

RATES = 0.01 * 2.0 ** (np.arange(25) / 3)


def uneven(shape: tuple[int, int], dtype: DType, seed: int, rows: float, columns: float) -> Array:
    """Weights whose rows and columns differ in scale, as a trained layer's do."""
    rng = np.random.default_rng(seed)
    scale = 0.02 * np.exp(rows * rng.standard_normal((shape[0], 1)))
    scale = scale * np.exp(columns * rng.standard_normal((1, shape[1])))
    return (rng.standard_normal(shape) * scale).astype(NUMPY_DTYPES[dtype])


def bounds_of(x: Array, rates: list[float]) -> list[float]:
    mean = float(np.abs(x.astype(np.float64)).mean())
    return [rate * mean for rate in rates]


@settings(max_examples=40)
@given(
    rows=st.integers(32, 160),
    columns=st.integers(64, 160),
    dtype=st.sampled_from(DTYPES),
    spread=st.floats(0, 0.5),
    seed=st.integers(0, 99),
    rates=st.lists(st.floats(0.005, 4), min_size=1, max_size=6),
)
def test_small_matrices_are_exact(
    rows: int, columns: int, dtype: DType, spread: float, seed: int, rates: list[float]
) -> None:
    x = uneven((rows, columns), dtype, seed, spread, spread / 2)
    bounds = bounds_of(x, rates)
    assert estimate_bytes(x, bounds).tolist() == [len(encode(x, b)) for b in bounds]


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2048, 1408), "BF16"), ((1408, 2048), "F16"), ((2048, 768), "F32")],
)
def test_large_matrices_within_a_hundredth(
    shape: tuple[int, int], dtype: DType, spread: float
) -> None:
    assert shape[0] * shape[1] > 2 * SAMPLE_WEIGHTS
    x = uneven(shape, dtype, 1, spread, spread / 2)
    bounds = bounds_of(x, RATES.tolist())
    found = estimate_bytes(x, bounds)
    # Every third one is looked at: none of them is known to be where all was encoded.
    written = np.array([len(encode(x, bound)) for bound in bounds[1::3]])
    off = found[1::3] / written - 1
    assert np.abs(off).max() < 0.01
    assert abs(off.mean()) < 0.003


def test_a_lattice_and_another_codec() -> None:
    """Sizes in steps, as of weights that were quantized before; and as SZ3 writes them."""
    x = (np.rint(gaussian((1100, 1024), "F32", scale=3)) / 64).astype(NUMPY_DTYPES["BF16"])
    bounds = bounds_of(x, RATES.tolist())
    found = estimate_bytes(x, bounds)
    written = np.array([len(encode(x, bound)) for bound in bounds[2::5]])
    assert np.abs(found[2::5] / written - 1).max() < 0.01
    y = gaussian((100, 64), "F32")
    assert estimate_bytes(y, [1e-3, 1e-2], codec="sz3").tolist() == [
        len(encode(y, bound, codec="sz3")) for bound in (1e-3, 1e-2)
    ]


def test_an_exact_copy_and_order() -> None:
    x = gaussian((64, 64))
    exact = len(encode(x, math.ulp(0.0), codec="lossless"))
    found = estimate_bytes(x, [0.01, 0, 0.001, 0.01])
    assert found.tolist() == [
        len(encode(x, 0.01)), exact, len(encode(x, 0.001)), len(encode(x, 0.01))
    ]  # fmt: skip
    large = gaussian((1100, 1024))
    bounds = [0.0, *(0.01 * 2.0**i for i in range(-6, 2))]
    assert estimate_bytes(large, bounds)[0] == len(encode(large, math.ulp(0.0), codec="lossless"))
    assert estimate_bytes(np.zeros((0, 4), np.float32), [0.1]).tolist() == [
        len(encode(np.zeros((0, 4), np.float32), 0.1))
    ]
    assert estimate_bytes(x, []).tolist() == []


@pytest.mark.parametrize("bound", [-1.0, math.inf, math.nan])
def test_no_bound(bound: float) -> None:
    with pytest.raises(BoundError, match="expected a finite number"):
        estimate_bytes(gaussian((4, 4)), [0.1, bound])


def test_no_array_for_it() -> None:
    with pytest.raises(CodecError):
        estimate_bytes(np.arange(4), [0.1])
