"""Codec `lossless`: the same bits back, whatever they are, and smaller where they are weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from moebound import decode, encode
from moebound.codec import envelope
from moebound.errors import CorruptionError
from moebound.types import NUMPY_DTYPES, Array, DType

from .kernel import ISAS, using
from .weights import arrays, bits, every_pattern, gaussian

EXAMPLES = settings(max_examples=200)


def _there_and_back(array: Array) -> int:
    """Bytes of the encoded array, which decodes to the same bits on every path."""
    encoded = encode(array, 1.0, codec="lossless")
    for isa in ISAS:
        with using(isa):
            assert encode(array, 1.0, codec="lossless") == encoded
            decoded = decode(encoded)
        assert isinstance(decoded, np.ndarray)
        assert decoded.shape == array.shape
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(bits(decoded), bits(array))
    return len(encoded)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("seed", [None, 1])
def test_every_pattern(dtype: DType, seed: int | None) -> None:
    """In order, where a row has one symbol, and shuffled."""
    array = every_pattern(dtype)
    if seed is not None:
        array = np.random.default_rng(seed).permutation(array.reshape(-1)).reshape(array.shape)
    _there_and_back(array)


@pytest.mark.parametrize("n", [1, 2, 31, 33, 4099, 70_001])
def test_random_bits_of_float32(n: int) -> None:
    """Every exponent, NaN payloads and signalling NaN among them."""
    patterns = np.random.default_rng(n).integers(0, 1 << 32, n, dtype=np.uint32)
    patterns[: n // 3] |= np.uint32(0x7F800001)
    n_bytes = _there_and_back(patterns.view(np.float32))
    assert n_bytes <= 4 * n + 5200  # noise does not shrink; a header and a table are what it costs


@EXAMPLES
@given(arrays())
def test_anything(array: Array) -> None:
    _there_and_back(array)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("BF16", 10.5, 10.7), ("F16", 13.4, 13.7), ("F32", 26.5, 26.7)]
)
def test_size_on_weights(dtype: DType, low: float, high: float) -> None:
    """Sign and mantissa are noise, which leaves the 2.55 bits of a Gaussian's exponent; fp16's
    exponent is coded with two mantissa bits, and its denormals are at hand."""
    array = gaussian((1024, 1408), dtype)
    assert low < 8 * len(encode(array, 1.0, codec="lossless")) / array.size < high


def test_constants_take_next_to_nothing_above_the_low_byte() -> None:
    array = np.full((512, 512), 0.3, NUMPY_DTYPES["BF16"])
    assert len(encode(array, 1.0, codec="lossless")) < array.size + 2000


@pytest.mark.parametrize("source", ["BF16", "F32"])
def test_a_cast_comes_first(source: DType) -> None:
    array = gaussian((40, 50), source)
    decoded = decode(encode(array, 0.01, codec="lossless", dtype="F16"))
    assert isinstance(decoded, np.ndarray)
    np.testing.assert_array_equal(bits(decoded), bits(array.astype(np.float16)))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_damage_below_the_checksum(dtype: DType) -> None:
    """Every prefix of a payload under a whole envelope: an error, and never a crash."""
    parsed = envelope.parse(encode(gaussian((20, 40), dtype), 1.0, codec="lossless"))
    for n_bytes in range(len(parsed.payload)):
        cut = envelope.Envelope(
            parsed.spec,
            parsed.codec,
            parsed.codec_version,
            parsed.payload[:n_bytes],
            parsed.misses,
            parsed.values,
        )
        with pytest.raises(CorruptionError, match="lossless"):
            decode(envelope.build(cut))
