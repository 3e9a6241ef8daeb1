"""Codec `bound`: every weight within ε, few bits, the same bytes on every path, damage refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

from moebound import _native, decode, encode
from moebound.codec import envelope, measure
from moebound.codec.arrays import dtype_name
from moebound.codec.base import ArraySpec
from moebound.codec.bound import EXACT, BoundCodec
from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.layout import Layout, read_layout, write_layout
from moebound.codec.reference.rans import read_segment, write_segment
from moebound.codec.registry import get_codec
from moebound.errors import CodecError, CorruptionError
from moebound.types import NUMPY_DTYPES, Array, DType

from .kernel import ISAS, kernel_decode, kernel_encode, using
from .weights import DTYPES, arrays, bits, bounds, broken, every_pattern, gaussian

EXAMPLES = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
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


def _scaled(shape: tuple[int, int], dtype: DType = "BF16", spread: float = 0.5) -> Array:
    rng = np.random.default_rng(8)
    values = rng.standard_normal(shape) * 0.02
    values *= np.exp(spread * rng.standard_normal((shape[0], 1)))
    values *= np.exp(spread * rng.standard_normal(shape[1]))
    return values.astype(NUMPY_DTYPES[dtype])


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
    "four lanes": _scaled((100, 150)),
    "whole groups": gaussian((300, 256)),
    "short groups": _scaled((301, 259)),
    "one short group": gaussian((4000, 9)),
    "float16": _scaled((260, 140), "F16"),
    "float32": _scaled((260, 140), "F32"),
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
    array = _scaled((512, 1408))
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


# --- damage -------------------------------------------------------------------------------------


def _in_lanes(payload: bytes, n: int, lanes_log: int) -> bytes:
    """The same symbols in another number of lanes: small payloads for the vector paths."""
    read = ByteReader(payload)
    layout = read_layout(read, n)
    parts = list(zip(layout.segments(n), layout.segment_words, strict=True))
    coded = [read_segment(read, layout, rows, n, n_words) for rows, n_words in parts]
    layout.lanes_log = lanes_log
    layout.segment_words = []
    segments = b""
    for (rows, _), (symbols, lows) in zip(parts, coded, strict=True):
        cuts = [slice(i * layout.columns, (i + 1) * layout.columns) for i in range(len(rows))]
        data, n_words = write_segment(
            [symbols[cut] for cut in cuts], [lows[cut] for cut in cuts], layout, rows
        )
        segments += data
        layout.segment_words.append(n_words)
    return write_layout(layout) + segments


def _small_payloads() -> dict[str, tuple[bytes, int, float, DType]]:
    """Of about 200 bytes, with each part that a payload can have."""
    plain, _ = kernel_encode(gaussian((9, 37)), 0.006, segment_weights=150)
    fine, _ = kernel_encode(gaussian((4, 40), "F16"), 2e-4)
    wide, _ = kernel_encode(_scaled((20, 35), "F32", 1.0), 0.01)
    exact, _ = kernel_encode(gaussian((3, 41)), 0.0)
    return {
        "one lane": (plain, 9 * 37, 0.006, "BF16"),
        "32 lanes": (_in_lanes(plain, 9 * 37, 5), 9 * 37, 0.006, "BF16"),
        "low bits": (_in_lanes(fine, 160, 5), 160, 2e-4, "F16"),
        "tables": (_in_lanes(wide, 700, 5), 700, 0.01, "F32"),
        "exact": (_in_lanes(exact, 123, 5), 123, 0.0, "BF16"),
    }


SMALL = _small_payloads()


def _verdict(payload: bytes, n: int, bound: float, dtype: DType) -> bytes | None:
    """What every path decodes this to; None if all of them refuse it."""
    verdicts: set[bytes | None] = set()
    for isa in ISAS:
        with using(isa):
            try:
                verdicts.add(kernel_decode(payload, n, bound, dtype=dtype).tobytes())
            except _native.Corrupt:
                verdicts.add(None)
    assert len(verdicts) == 1, f"{ISAS} disagree on {payload.hex()}"
    return verdicts.pop()


small = pytest.mark.parametrize("name", SMALL)


@small
def test_whole_payloads_are_accepted(name: str) -> None:
    assert _verdict(*SMALL[name]) is not None


@small
def test_truncated(name: str) -> None:
    payload, n, bound, dtype = SMALL[name]
    for n_bytes in range(len(payload)):
        assert _verdict(payload[:n_bytes], n, bound, dtype) is None
    assert _verdict(payload + b"\0", n, bound, dtype) is None


@small
def test_every_single_bit(name: str) -> None:
    payload, n, bound, dtype = SMALL[name]
    n_refused = 0
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        n_refused += _verdict(bytes(damaged), n, bound, dtype) is None
    # Low bits, padding and values of symbols say nothing about each other; the rest does.
    assert n_refused > 2 * len(payload)


@small
def test_mutations(name: str) -> None:
    payload, n, bound, dtype = SMALL[name]
    rng = np.random.default_rng(11)
    for _ in range(600):
        damaged = bytearray(payload)
        for _ in range(rng.integers(1, 6)):
            end = len(damaged) if rng.random() < 0.5 else min(16, len(damaged))
            at = int(rng.integers(0, end))
            choice = rng.integers(0, 5)
            if choice == 0:
                del damaged[at]
            elif choice == 1:
                damaged.insert(at, int(rng.integers(0, 256)))
            elif choice == 2:
                damaged[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            else:
                damaged[at] = int(rng.integers(0, 256))
        _verdict(bytes(damaged), n, bound, dtype)


@small
@pytest.mark.parametrize("n", [1, 31, 100, 10_000, 1 << 22])
def test_another_size(name: str, n: int) -> None:
    """An envelope that lies about the shape: no more memory than the values asked for."""
    payload, _, bound, dtype = SMALL[name]
    _verdict(payload, n, bound, dtype)


def test_random_bytes() -> None:
    rng = np.random.default_rng(12)
    for _ in range(500):
        head = bytes([12, 5, int(rng.integers(0, 9)), 1, 3]) if rng.random() < 0.7 else b""
        payload = head + rng.bytes(int(rng.integers(0, 200)))
        if payload[:1] != b"\0":
            _verdict(payload, 300, 0.01, "BF16")


def test_damage_names_the_codec() -> None:
    parsed = envelope.parse(encode(gaussian((50, 40)), 0.01))
    cut = envelope.Envelope(
        parsed.spec, parsed.codec, 1, parsed.payload[:-4], parsed.misses, parsed.values
    )
    with pytest.raises(CorruptionError, match="bound: payload ends early"):
        decode(envelope.build(cut))


def test_what_the_kernel_refuses() -> None:
    array: npt.NDArray[np.float32] = np.ones(10, np.float32)
    for bound in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="bound"):
            kernel_encode(array, bound)
    with pytest.raises(ValueError, match="exact copy"):
        kernel_encode(array, 0.0)
    for columns in (0, (1 << 16) + 1):
        with pytest.raises(ValueError, match="size"):
            kernel_encode(array, 0.1, columns=columns)
    for segment_weights in (0, (1 << 18) + 1):
        with pytest.raises(ValueError, match="segment_weights"):
            kernel_encode(array, 0.1, segment_weights=segment_weights)
    with pytest.raises(ValueError, match="instruction set"):
        _native.use_isa("mmx")


def test_flush_to_zero_changes_nothing() -> None:
    """A caller may have asked its FPU for flush-to-zero: bounds below 1.2e-38 must still hold."""
    torch = pytest.importorskip("torch")
    x = np.arange(1, 200, dtype=np.uint16).view(NUMPY_DTYPES["BF16"])
    expected = encode(x, 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero")
    try:
        data = encode(x, 1e-40)
        decoded = decode(data)
        assert isinstance(decoded, np.ndarray)
        found = measure(x, decoded, 1e-40)
    finally:
        torch.set_flush_denormal(False)
    assert data == expected
    assert found.broken == 0


def test_a_tiny_payload_cannot_ask_for_a_huge_grid() -> None:
    layout = Layout(
        table_log=1, lanes_log=0, low_bits=8, columns=1, rows_per_segment=1,
        symbol_low=1 << 17, n_symbols=1, tables=[[2]], rests=[0],
    )  # fmt: skip
    segment, n_words = write_segment([[0]], [[0]], layout, range(1))
    layout.segment_words = [n_words]
    with pytest.raises(_native.Corrupt, match="grid"):
        _native.bound_decode(write_layout(layout) + segment, np.zeros(1, np.float32), 2, 1e-9, 1)


def test_many_callers_share_the_helper_threads() -> None:
    x = gaussian((256, 1024), "BF16")
    codec = BoundCodec(segment_weights=1 << 12)
    spec = ArraySpec(x.shape, "BF16", "BF16", 1e-3)
    expected = codec.compress(x, spec, threads=1).data

    def job(n_threads: int) -> bool:
        return codec.compress(x, spec, threads=n_threads).data == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(job, [1 + i % 5 for i in range(64)]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_helpers_of_its_own() -> None:
    program = """
import os, sys, numpy as np, moebound
x = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
data = moebound.encode(x, 0.01, codec="bound:segment=4096")
child = os.fork()
if child == 0:
    os._exit(0 if moebound.encode(x, 0.01, codec="bound:segment=4096") == data else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "MOEBOUND_THREADS": "4"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert done.returncode == 0
