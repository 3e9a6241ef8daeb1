"""Codec `bound`: every weight within ε, few bits, the same bytes on every path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings

from moebound import decode, encode
from moebound.codec import envelope
from moebound.codec.arrays import dtype_name
from moebound.codec.bound import EXACT, BoundCodec
from moebound.codec.registry import get_codec
from moebound.errors import CodecError, CorruptionError
from moebound.types import NUMPY_DTYPES, Array, DType

from .kernel import ISAS, kernel_decode, kernel_encode, using
from .weights import DTYPES, arrays, bits, bounds, broken, every_pattern, gaussian, scaled_both_ways

EXAMPLES = settings(max_examples=200)
BOUNDS = (
    5e-324, 1e-45, 1e-41, 1.2e-38, 3e-30, 6e-8, 1e-6, 3e-5, 2.0**-11, 7e-4, 0.003, 0.011, 0.1,
    0.25, 1.0, 7.3, 100.0, 3e4, 65504.0, 1e20, 3.4e38, 1e300,
)  # fmt: skip


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


def _decode(encoded: bytes) -> Array:
    decoded = decode(encoded)
    assert isinstance(decoded, np.ndarray)
    return decoded


def _entropy(decoded: Array) -> float:
    """Bits per value of an ideal coder that knows how often each value occurs."""
    _, counts = np.unique(bits(decoded), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def _bits_per_weight(encoded: bytes, array: Array) -> float:
    return 8 * len(encoded) / array.size


# --- the bound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_every_pattern_within_the_bound(dtype: DType, bound: float, isa: str) -> None:
    array = every_pattern(dtype)
    decoded = _decode(encode(array, bound))
    assert not len(broken(array, decoded, bound))


@pytest.mark.parametrize("bound", BOUNDS)
def test_float32_within_the_bound(bound: float, isa: str) -> None:
    """Any bits at all; then weights as large as the bound makes hard."""
    rng = np.random.default_rng(3)
    anything = rng.integers(0, 1 << 32, (130, 300), dtype=np.uint32).view(np.float32)
    assert not len(broken(anything, _decode(encode(anything, bound)), bound))
    with np.errstate(over="ignore", under="ignore"):
        near = (rng.standard_normal((130, 300)) * min(bound, 1e38) * 50).astype(np.float32)
    assert not len(broken(near, _decode(encode(near, bound)), bound))


@EXAMPLES
@given(array=arrays(), bound=bounds)
def test_anything_within_the_bound(array: Array, bound: float) -> None:
    decoded = _decode(encode(array, bound))
    assert decoded.shape == array.shape
    assert decoded.dtype == array.dtype
    assert not len(broken(array, decoded, bound))


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("rate", [0.02, 0.3, 3.0])
def test_after_a_cast(source: DType, output: DType, rate: float, isa: str) -> None:
    array = gaussian((180, 200), source)
    decoded = _decode(encode(array, rate * 0.016, dtype=output))
    assert decoded.dtype == NUMPY_DTYPES[output]
    error = np.abs(array.astype(np.float64) - decoded.astype(np.float64))
    assert error.max() <= rate * 0.016


def test_the_bound_is_used() -> None:
    """Cells as wide as they can be: the worst error is next to ε, and errors are uniform."""
    array = gaussian((300, 400), "F32")
    error = array.astype(np.float64) - _decode(encode(array, 0.001))
    assert 0.999e-3 < np.abs(error).max() <= 1e-3
    assert np.sqrt((error**2).mean()) == pytest.approx(1e-3 / np.sqrt(3), rel=0.01)


# --- one way to write it ------------------------------------------------------------------------

ARRAYS = {
    "one lane": gaussian((50, 100)),
    "four lanes": scaled_both_ways((100, 150)),
    "whole groups": gaussian((300, 256)),
    "short groups": scaled_both_ways((301, 259)),
    "one short group": gaussian((4000, 9)),
    "float16": scaled_both_ways((260, 140), "F16"),
    "float32": scaled_both_ways((260, 140), "F32"),
    "every pattern": every_pattern("BF16"),
    "a vector": gaussian((50_001,)),
    "two values": (np.random.default_rng(4).random((256, 256)) < 0.492).astype(np.float32),
    "rare values": (np.random.default_rng(4).random((256, 256)) < 0.004).astype(np.float16),
}


@pytest.mark.parametrize("bound", [1e-6, 3e-4, 0.004, 0.03, 0.4])
@pytest.mark.parametrize("name", ARRAYS)
def test_every_path_writes_and_reads_the_same(name: str, bound: float) -> None:
    array = ARRAYS[name]
    columns = array.shape[-1] if array.ndim > 1 else 2048
    for segment_weights in (1 << 18, 5000):
        written, read = set(), set()
        for isa in ISAS:
            for threads in (1, 2, 4):
                with using(isa):
                    payload, misses = kernel_encode(
                        array,
                        bound,
                        columns=columns,
                        segment_weights=segment_weights,
                        threads=threads,
                    )
                    decoded = kernel_decode(
                        payload, array.size, bound, dtype=dtype_name(array.dtype), threads=threads
                    )
                written.add((payload, misses.tobytes()))
                read.add(decoded.tobytes())
        assert len(written) == len(read) == 1


@pytest.mark.parametrize("percent", [1, 20, 47, 51, 60, 85, 99])
def test_two_values_in_every_proportion(percent: int) -> None:
    """States of a frequent symbol are the largest: where a vector division is least exact."""
    array = (np.arange(1 << 16) % 100 < percent).astype(np.float32)
    array = np.random.default_rng(percent).permutation(array).reshape(256, 256)
    payloads = set()
    for isa in ISAS:
        with using(isa):
            payload, _ = kernel_encode(array, 0.4)
            decoded = kernel_decode(payload, array.size, 0.4, dtype="F32").view(np.float32)
        payloads.add(payload)
        assert np.abs(decoded.reshape(array.shape) - array).max() <= 0.4
    assert len(payloads) == 1


# --- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.02, 0.05, 0.3, 0.8, 2.0])
def test_size_is_next_to_entropy(dtype: DType, rate: float) -> None:
    array = gaussian((512, 1408), dtype)
    bound = rate * float(np.abs(array.astype(np.float64)).mean())
    encoded = encode(array, bound)
    entropy = _entropy(_decode(encoded))
    assert _bits_per_weight(encoded, array) <= entropy + 0.05


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8])
def test_scales_make_it_smaller_than_one_table(rate: float) -> None:
    array = scaled_both_ways((512, 1408))
    bound = rate * float(np.abs(array.astype(np.float64)).mean())
    encoded = encode(array, bound)
    assert _bits_per_weight(encoded, array) < _entropy(_decode(encoded)) - 0.2


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -7.0])
def test_constants_are_a_header(value: float) -> None:
    array = np.full((500, 300), value, NUMPY_DTYPES["BF16"])
    encoded = encode(array, 0.001)
    assert len(encoded) < 300
    assert not len(broken(array, _decode(encoded), 0.001))


def test_one_value() -> None:
    encoded = encode(np.array(0.37, np.float16), 0.01)
    assert len(encoded) < 64
    assert abs(float(_decode(encoded)) - 0.37) <= 0.01 + 2.0**-12


def test_sixteen_million_zeros() -> None:
    array = np.zeros(1 << 24, NUMPY_DTYPES["BF16"])
    encoded = encode(array, 1e-3)
    assert len(encoded) < 16_384  # 64 segments of 32 states
    assert not bits(_decode(encoded)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_nan(dtype: DType) -> None:
    array = np.full((60, 50), np.nan, NUMPY_DTYPES[dtype])
    assert not len(broken(array, _decode(encode(array, 0.1)), 0.1))


# --- the exact copy -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exact_copy_where_that_is_smaller(dtype: DType) -> None:
    array = gaussian((200, 300), dtype)
    tight, loose = encode(array, 1e-12), encode(array, 0.01)
    copy = encode(array, 1e-12, codec="lossless")
    assert len(tight) <= len(copy)
    if dtype != "BF16":  # whose grid is its own numbers then: coding cells is as good
        assert envelope.parse(tight).payload[0] == EXACT
        assert envelope.parse(tight).payload[1:] == envelope.parse(copy).payload
    assert envelope.parse(loose).payload[0] != EXACT
    np.testing.assert_array_equal(bits(_decode(tight)), bits(array))


def test_no_exact_copy_of_another_dtype() -> None:
    array = gaussian((50, 40), "F32")
    encoded = encode(array, 1e-3, dtype="F16")
    assert envelope.parse(encoded).payload[0] != EXACT


def test_a_bound_of_zero_needs_an_exact_copy() -> None:
    parsed = envelope.parse(encode(gaussian((50, 40)), 0.01))
    spec = parsed.spec
    zero = type(spec)(spec.shape, spec.dtype, spec.source_dtype, 0.0)
    with pytest.raises(CorruptionError, match="bound of 0"):
        BoundCodec().decompress(parsed.payload, zero, np.empty(spec.size, spec.numpy_dtype))


# --- segments -----------------------------------------------------------------------------------


def test_segment_option() -> None:
    array = gaussian((300, 400))
    sizes = [len(encode(array, 0.01, codec=f"bound:segment={n}")) for n in (1 << 18, 20_000, 400)]
    assert sizes == sorted(sizes)
    assert sizes[0] == len(encode(array, 0.01))
    for n in (1, 399, 401, 20_000):
        encoded = encode(array, 0.01, codec=f"bound:segment={n}")
        assert not len(broken(array, _decode(encoded), 0.01))


@pytest.mark.parametrize("segment_weights", [1, 7, 65_535, 1 << 18])
def test_rows_longer_than_a_segment(segment_weights: int, isa: str) -> None:
    array = gaussian((3, 1 << 16))
    encoded = encode(array, 0.01, codec=BoundCodec(segment_weights=segment_weights))
    assert not len(broken(array, _decode(encoded), 0.01))


@pytest.mark.parametrize(("name", "segment_weights"), [("gpu", 1 << 14), ("size", 1 << 18)])
def test_segments_have_names(name: str, segment_weights: int) -> None:
    array = gaussian((300, 512))
    want = encode(array, 0.01, codec=BoundCodec(segment_weights=segment_weights))
    assert encode(array, 0.01, codec=f"bound:segment={name}") == want


@pytest.mark.parametrize(
    "options", ["segment", "segment=", "segment=0", "segment=-1", "segment=1e3", "rows=3", "3"]
)
def test_other_options_are_refused(options: str) -> None:
    with pytest.raises(CodecError, match="segment"):
        get_codec(f"bound:{options}")
    with pytest.raises(CodecError, match="262144"):
        BoundCodec(segment_weights=(1 << 18) + 1)
