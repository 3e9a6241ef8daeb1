"""Elias-Fano positions: there and back, as small as promised, and damage seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.codec import patch
from moebound.errors import CorruptionError

from .weights import gaussian


@st.composite
def positions(draw: st.DrawFn) -> tuple[int, list[int]]:
    size = draw(st.one_of(st.integers(1, 60), st.integers(1, 1 << 40)))
    chosen = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=60))
    return size, sorted(chosen)


@given(positions())
def test_there_and_back(case: tuple[int, list[int]]) -> None:
    size, chosen = case
    packed = patch.pack_positions(np.array(chosen, np.uint64), size)
    assert len(packed) == patch.positions_n_bytes(size, len(chosen))
    assert patch.unpack_positions(memoryview(packed), size, len(chosen)).tolist() == chosen


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_every_position_at_once(size: int) -> None:
    packed = patch.pack_positions(np.arange(size, dtype=np.uint64), size)
    assert patch.unpack_positions(memoryview(packed), size, size).tolist() == list(range(size))


@given(positions())
def test_size_is_as_promised(case: tuple[int, list[int]]) -> None:
    """At most 3 + log2(n/P) bits a position, and the padding of two bit strings."""
    size, chosen = case
    bits = 8 * patch.positions_n_bytes(size, len(chosen))
    assert bits <= len(chosen) * (3 + math.log2(size / len(chosen))) + 16


@given(positions(), st.data())
def test_damage_is_an_error_or_other_positions_in_range(
    case: tuple[int, list[int]], data: st.DataObject
) -> None:
    size, chosen = case
    packed = bytearray(patch.pack_positions(np.array(chosen, np.uint64), size))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = patch.unpack_positions(memoryview(packed), size, len(chosen)).tolist()
    except CorruptionError:
        return
    assert len(found) == len(chosen)
    assert found == sorted(set(found))
    assert found[-1] < size


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"\x00\x00", "expected 2 positions, found 0"),
        # Size 20, two positions: 3 low bits each in the first byte, unary in the second.
        (bytes([0b011_011, 0b0011]), "not ascending"),
        (bytes([0b111_011, 0b11000]), "not ascending below 20"),
        (bytes([0b001_011, 0b1101]), "expected 2 positions, found 3"),
    ],
)
def test_impossible_positions(packed: bytes, message: str) -> None:
    with pytest.raises(CorruptionError, match=message):
        patch.unpack_positions(memoryview(packed), 20, 2)


def test_apply_puts_values_where_they_belong() -> None:
    out, values = gaussian((10,)), gaussian((2,), seed=1)
    expected = out.copy()
    expected[3], expected[7] = values
    patch.apply(out, np.array([3, 7], np.uint64), values)
    assert np.array_equal(out, expected)
