"""The readable codec in parts: numbers and the grid over them, logarithms, bit strings, varints."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound import _native
from moebound.codec.bound import DTYPE_CODES
from moebound.codec.reference import bits as reference_bits
from moebound.codec.reference import make_grid
from moebound.codec.reference.formats import FORMATS
from moebound.codec.reference.model import fixed_log2
from moebound.errors import CorruptionError
from moebound.types import NUMPY_DTYPES, Array, DType

from .weights import DTYPES, every_pattern

BOUNDS_16 = (5e-324, 1e-42, 1e-39, 6e-8, 1e-6, 0.001, 0.0033, 0.1, 1.0, 7.3, 1e4, 1e20, 1e38, 1e308)


# --- the numbers and the grid -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_patterns(dtype: DType) -> None:
    numbers = FORMATS[dtype]
    step = 1 if numbers.n_bits == 16 else 65_413
    patterns = np.arange(0, numbers.largest + 1, step).astype(numbers.bits_dtype)
    expected = patterns.view(NUMPY_DTYPES[dtype]).astype(np.float64)
    assert [numbers.value(pattern) for pattern in patterns.tolist()] == expected.tolist()
    after = np.array([numbers.largest + 1], numbers.bits_dtype).view(NUMPY_DTYPES[dtype])
    assert np.isinf(after.astype(np.float64)).all()


def _numbers(dtype: DType) -> npt.NDArray[np.float64]:
    """Every finite non-negative number of a 16-bit dtype, ascending."""
    return every_pattern(dtype).reshape(-1)[: FORMATS[dtype].largest + 1].astype(np.float64)


def _last_within(values: npt.NDArray[Any], centers: npt.NDArray[Any], bound: float) -> Array:
    """Index of the last value x with x - center <= bound for each center, by bisection."""
    low = np.full(len(centers), -1)
    high = np.full(len(centers), len(values) - 1)
    for _ in range(17):
        middle = (low + high + 1) // 2
        within = values[middle] - centers <= bound
        low, high = np.where(within, middle, low), np.where(within, high, middle - 1)
        high = np.maximum(low, high)
    return low


@pytest.mark.parametrize("bound", BOUNDS_16)
@pytest.mark.parametrize(
    ("source", "output"), [("BF16", "BF16"), ("F16", "F16"), ("BF16", "F16"), ("F16", "BF16")]
)
def test_grid_covers_all_with_the_fewest_cells(source: DType, output: DType, bound: float) -> None:
    """Judged by a method of its own: every output value is an interval of source numbers, and the
    fewest intervals that cover are found by always jumping as far as any one of them reaches."""
    grid = make_grid(source, output, bound, 1 << 15)
    S, T = _numbers(source), _numbers(output)
    end = grid.edges[-1] + 1
    cell = np.searchsorted(grid.edges, np.arange(end))
    assert np.all(np.abs(S[:end] - T[np.array(grid.values)[cell]]) <= bound)

    past = _last_within(S, T, bound) + 1  # the interval of value v: first[v] .. past[v] - 1
    first = len(S) - 1 - _last_within(-S[::-1], -T, bound)
    furthest = np.arange(len(S) + 1)  # from a first uncovered number to the next
    held = first < past
    np.maximum.at(furthest, first[held], past[held])
    furthest = np.maximum.accumulate(furthest)
    covered, n_cells = int(past[0]), 1  # bin 0 decodes to 0
    while covered < end:
        covered, n_cells = int(furthest[covered]), n_cells + 1
    assert len(grid.values) == n_cells
    assert end == len(S) or (source != output and furthest[end] == end)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("output", DTYPES)
def test_grid_is_the_kernels(source: DType, output: DType) -> None:
    for bound in (*BOUNDS_16, 2.0**-9, 3 * 2.0**-12, 0.1234567):
        for n_cells, up_to in ((1, None), (700, None), (700, 0), (300, 0x3DCC)):
            grid = make_grid(source, output, bound, n_cells, up_to)
            codes = DTYPE_CODES[source], DTYPE_CODES[output]
            limit = 0xFFFFFFFF if up_to is None else up_to
            values, edges = _native.grid(*codes, bound, n_cells, limit)
            assert grid.values == values.tolist()
            assert grid.edges == edges.tolist()


@given(st.integers(1, (1 << 63) - 1))
def test_fixed_log2(x: int) -> None:
    assert abs(fixed_log2(x) / 65536 - np.log2(float(x))) < 3 / 65536


# --- the small parts ----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, (1 << 20) - 1), st.integers(0, 20))))
def test_bit_strings(fields: list[tuple[int, int]]) -> None:
    out = bytearray()
    writer = reference_bits.BitWriter(out)
    for value, n_bits in fields:
        writer.put(value, n_bits)
        writer.put_ones(value % 9)
    reader = reference_bits.BitReader(reference_bits.ByteReader(bytes(out)))
    for value, n_bits in fields:
        assert reader.take(n_bits) == value % (1 << n_bits)
        assert reader.ones() == value % 9


@pytest.mark.parametrize("value", [0, 1, -1, 2, -2, 500, -500])
def test_zigzag(value: int) -> None:
    assert reference_bits.unzigzag(reference_bits.zigzag(value)) == value
    assert 0 <= reference_bits.zigzag(value) <= 2 * abs(value)


def test_varints_have_five_bytes_at_most() -> None:
    read = reference_bits.ByteReader(bytes([0x80] * 4 + [0x01]) + struct.pack("<Q", 1 << 63))
    assert read.varint("long", 0, 1 << 40) == 1 << 28
    with pytest.raises(CorruptionError, match="5 bytes"):
        reference_bits.ByteReader(bytes([0x80] * 6)).varint("long", 0, 1 << 60)
