"""The judge, judged: the native comparison against NumPy in float64, XXH64 against xxhash."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound import _native
from moebound.codec.measure import measure, stats, violations
from moebound.types import NUMPY_DTYPES, Array

from .weights import DTYPES, arrays, bounds, broken, every_pattern

PAIRS = settings(max_examples=300)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """An array, and another of its shape and dtype that agrees with it mostly."""
    original = draw(arrays())
    decoded = original.copy()
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    with np.errstate(all="ignore"):
        noise = rng.standard_normal(original.shape) * 10.0 ** draw(st.integers(-44, 37))
        moved = (original.astype(np.float64) + noise).astype(original.dtype)
    mask = rng.random(original.shape) < 0.5
    decoded[mask] = moved[mask]
    for value in draw(st.lists(st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf]), max_size=3)):
        decoded[rng.random(original.shape) < 0.1] = value
    return original, decoded


@PAIRS
@given(pairs(), bounds)
def test_measure_and_violations_agree_with_numpy(pair: tuple[Array, Array], bound: float) -> None:
    original, decoded = pair
    expected = broken(original, decoded, bound)
    assert violations(original, decoded, bound).tolist() == expected.tolist()
    found = measure(original, decoded, bound)
    assert found.broken == len(expected)
    x = original.astype(np.float64).reshape(-1)
    finite = np.isfinite(x)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(x - decoded.astype(np.float64).reshape(-1))[finite]
        errors = np.where(np.isnan(errors), np.inf, errors)
        rmse = math.sqrt((errors**2).mean()) if errors.size else 0.0
    assert found.max_abs_error == (errors.max() if errors.size else 0.0)
    if math.isfinite(rmse):
        assert found.rmse == pytest.approx(rmse, rel=1e-12, abs=0.0)
    else:
        assert not math.isfinite(found.rmse)


@PAIRS
@given(arrays(), st.sampled_from(DTYPES), bounds)
def test_across_dtypes(original: Array, dtype: str, bound: float) -> None:
    """Finite values by their distance; non-finite ones must be the same non-finite value."""
    with np.errstate(all="ignore"):
        decoded = original.astype(NUMPY_DTYPES[dtype])  # type: ignore[index]
        x, y = (a.astype(np.float64).reshape(-1) for a in (original, decoded))
        off = np.isfinite(x) & ~(np.abs(x - y) <= bound)
    found = violations(original, decoded, bound)
    kept = np.isfinite(x[found.astype(np.int64)])
    assert found[kept].tolist() == np.flatnonzero(off).tolist()
    assert measure(original, decoded, bound).broken == len(found)
    assert not np.isinf(x[found.astype(np.int64)]).any()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_only_the_same_bits_replace_a_nan(dtype: str) -> None:
    """Every NaN and Inf of a 16-bit dtype against its neighbour in bits."""
    patterns = every_pattern(dtype)  # type: ignore[arg-type]
    odd = patterns[~np.isfinite(patterns.astype(np.float32))]
    assert len(odd) == (256 if dtype == "BF16" else 2048)
    assert measure(odd, odd.copy(), 1e300).broken == 0
    quiet_bit = 1 << (6 if dtype == "BF16" else 9)
    for flipped in (1, quiet_bit, 1 << 15):
        other = (odd.view(np.uint16) ^ flipped).astype(np.uint16).view(odd.dtype)
        assert measure(odd, other, 1e300).broken == len(odd)


def test_zeros_of_either_sign_are_one_value() -> None:
    zeros = np.array([0.0, -0.0], np.float32)
    assert measure(zeros, -zeros, 5e-324).broken == 0


def test_a_nan_for_a_weight_is_the_worst_error() -> None:
    found = measure(np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32), 1e300)
    assert (found.max_abs_error, found.broken) == (math.inf, 1)


def test_error_is_exact_where_float32_rounds_it_away() -> None:
    x = np.array([1.0], np.float32)
    y = np.array([np.nextafter(np.float32(1e-9), np.float32(1))], np.float32)
    exact = 1.0 - float(y[0])
    assert measure(x, y, exact).broken == 0
    assert measure(x, y, np.nextafter(exact, 0)).broken == 1


@PAIRS
@given(arrays())
def test_stats_agree_with_numpy(array: Array) -> None:
    found = stats(array)
    x = array.astype(np.float64).reshape(-1)
    x = x[np.isfinite(x)]
    assert found.count == x.size
    assert found.abs_sum == pytest.approx(np.abs(x).sum(), rel=1e-12)
    assert found.square_sum == pytest.approx((x**2).sum(), rel=1e-12)
    if x.size:
        assert (found.lowest, found.highest) == (x.min(), x.max())
        assert found.range == x.max() - x.min()
        assert found.mean_abs == pytest.approx(np.abs(x).mean(), rel=1e-12)
        assert found.rms == pytest.approx(math.sqrt((x**2).mean()), rel=1e-12)
    else:
        assert (found.mean_abs, found.rms, found.range) == (0.0, 0.0, 0.0)


def test_stats_of_many_values() -> None:
    x = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
    assert stats(x).abs_sum == pytest.approx(np.abs(x.astype(np.float64)).sum(), rel=1e-12)


@given(st.binary(max_size=400), st.integers(0, (1 << 64) - 1))
def test_xxh64_is_xxh64(data: bytes, seed: int) -> None:
    assert _native.xxh64(data, seed) == xxhash.xxh64(data, seed).intdigest()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_xxh64_of_long_and_misaligned_buffers(kind: type) -> None:
    data = np.random.default_rng(1).bytes(100_003)
    for start in range(5):
        view = kind(data)[start:]
        assert _native.xxh64(view) == xxhash.xxh64(data[start:]).intdigest()
