"""One suite over every registered codec: the bound, the shape, the bytes, the damage."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from moebound import codec_ids, decode, encode
from moebound.codec.cuszp import MODES, CuszpCodec
from moebound.codec.registry import get_codec
from moebound.codec.sz3 import ALGORITHMS
from moebound.errors import FormatError
from moebound.types import Array, DType

from .weights import arrays, bits, bounds, broken, every_pattern, gaussian

BOUNDS = (1e-45, 1e-40, 1e-20, 1e-7, 1e-4, 0.003, 0.1, 1.0, 7.0, 1e4, 1e20, 3e38)
EXAMPLES = settings(max_examples=200)


def _names() -> list[str]:
    cuszp = (f"cuszp:{mode}" for mode in MODES if mode != CuszpCodec().mode)
    return [*codec_ids(), *(f"sz3:{algorithm}" for algorithm in ALGORITHMS), *cuszp]


every_codec = pytest.mark.parametrize("codec", _names())


def _decode(data: bytes) -> Array:
    decoded = decode(data)
    assert isinstance(decoded, np.ndarray)
    return decoded


@every_codec
def test_keeps_the_bound_on_anything(codec: str) -> None:
    @EXAMPLES
    @given(array=arrays(), bound=bounds)
    def check(array: Array, bound: float) -> None:
        decoded = _decode(encode(array, bound, codec=codec))
        assert decoded.shape == array.shape
        assert decoded.dtype == array.dtype
        assert not len(broken(array, decoded, bound))

    check()


@every_codec
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_keeps_the_bound_on_every_bit_pattern(codec: str, dtype: DType) -> None:
    array = every_pattern(dtype)
    for bound in BOUNDS:
        assert not len(broken(array, _decode(encode(array, bound, codec=codec)), bound)), bound


@every_codec
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_keeps_the_bound_on_weights_and_uses_it(codec: str, dtype: DType) -> None:
    array = gaussian((96, 160), dtype)
    data = encode(array, 0.01, codec=codec)
    error = np.abs(array.astype(np.float64) - _decode(data).astype(np.float64)).max()
    assert error <= 0.01
    if get_codec(codec).lossy and codec != "sz3:lossless":
        # A codec that quietly went lossless would pass everything else here.
        assert error > 0.001
        assert 8 * len(data) / array.size < 10.0


@every_codec
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0,), np.float32),
        np.zeros((3, 0, 2), np.float16),
        np.array(1.25, np.float32),
        np.array([-3.0], ml_dtypes.bfloat16),
        np.zeros((33, 65), np.float16),
        np.full((1, 129), 0.7, ml_dtypes.bfloat16),
        np.full(5, np.nan, np.float32),
        gaussian((64, 48))[::3, ::-2],
        gaussian((6, 5, 4, 3), "F32").transpose(2, 0, 3, 1),
    ],
    ids=["empty", "empty3d", "0d", "one", "zeros", "constant", "nan", "strided", "transposed"],
)
def test_corner(codec: str, array: Array) -> None:
    before = array.copy()
    decoded = _decode(encode(array, 0.003, codec=codec))
    assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype)
    assert not len(broken(array, decoded, 0.003))
    assert np.array_equal(bits(array), bits(before)), "encode changed its input"


@every_codec
def test_same_bytes_every_time_and_for_every_thread_count(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = gaussian((300, 257), seed=3)
    array[7, 5] = np.nan
    found = set()
    for threads in ("1", "2", "3", "1"):
        monkeypatch.setenv("MOEBOUND_THREADS", threads)
        data = encode(array, 0.004, codec=codec)
        found.add(data)
        assert not len(broken(array, _decode(data), 0.004))
    assert len(found) == 1


@every_codec
def test_truncated_bytes_raise(codec: str) -> None:
    data = encode(gaussian((9, 31)), 0.004, codec=codec)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            decode(data[:length])
    with pytest.raises(FormatError):
        decode(data + b"\0")


@every_codec
def test_every_flipped_bit_raises(codec: str) -> None:
    array = gaussian((5, 13))
    array[2, 2] = np.inf
    data = encode(array, 0.004, codec=codec)
    for at in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(FormatError):
            decode(damaged)


@every_codec
def test_damage_that_the_checksum_hides_never_kills_the_process(codec: str) -> None:
    """Payload bytes changed and the checksum made to fit: an error, or wrong numbers, no crash."""
    script = f"""
        import struct, numpy as np
        from moebound import MoeboundError, decode, encode
        from moebound.codec import parse
        from moebound.codec.fields import checksum

        rng = np.random.default_rng(5)
        array = rng.standard_normal((40, 57)).astype(np.float32)
        data = encode(array, 0.1, codec={codec!r})
        n_payload = len(parse(data).payload)
        start, errors = len(data) - 4 - n_payload, 0
        for trial in range(400):
            body = bytearray(data[:-4])
            # Half of the damage goes to the ends, where headers are.
            for _ in range(rng.integers(1, 4)):
                near = rng.integers(0, min(48, n_payload))
                at = [near, n_payload - 1 - near, rng.integers(n_payload)][rng.integers(3)]
                body[start + at] = rng.integers(256)
            try:
                assert decode(bytes(body) + struct.pack("<I", checksum(body))).shape == array.shape
            except MoeboundError:
                errors += 1
        print("survived", errors)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("survived")
