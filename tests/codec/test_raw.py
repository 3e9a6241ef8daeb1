"""The yardstick: bytes as they are."""

from __future__ import annotations

import numpy as np
import pytest

from moebound import decode, encode
from moebound.codec.base import ArraySpec
from moebound.codec.envelope import parse
from moebound.codec.raw import RawCodec
from moebound.errors import CorruptionError
from moebound.types import DType

from .weights import DTYPES, bits, every_pattern, gaussian


@pytest.mark.parametrize("dtype", DTYPES)
def test_payload_is_the_memory(dtype: DType) -> None:
    array = gaussian((5, 7), dtype)
    parsed = parse(encode(array, 1e-9, codec="raw"))
    assert bytes(parsed.payload) == array.tobytes()
    assert not len(parsed.misses)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_bit_comes_back(dtype: DType) -> None:
    array = every_pattern(dtype)
    decoded = np.asarray(decode(encode(array, 1.0, codec="raw")))
    assert np.array_equal(bits(decoded), bits(array))


def test_casts_to_the_dtype_asked_round_to_nearest_even() -> None:
    array = np.array([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256], np.float32)
    decoded = np.asarray(decode(encode(array, 0.01, codec="raw", dtype="bfloat16")))
    assert decoded.astype(np.float64).tolist() == [1.0, 1 + 4 / 256, -1.0]


@pytest.mark.parametrize("n_bytes", [0, 11, 13])
def test_wrong_length(n_bytes: int) -> None:
    spec = ArraySpec((3,), "F32", "F32", 1.0)
    with pytest.raises(CorruptionError, match=f"expected 12 bytes, found {n_bytes}"):
        RawCodec().decompress(memoryview(bytes(n_bytes)), spec, np.empty(3, np.float32))
