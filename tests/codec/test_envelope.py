"""The frame: its bytes, spelled out once, and everything that can be wrong with them."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from moebound.codec.base import ArraySpec
from moebound.codec.envelope import Envelope, build, parse
from moebound.codec.fields import checksum, put_varint
from moebound.errors import CorruptionError, FormatError
from moebound.types import NUMPY_DTYPES

from .weights import DTYPES, bits

NOTHING = np.empty(0, np.uint64)


def _plain(shape: tuple[int, ...] = (2,), payload: bytes = b"\x01\x02\x03\x04") -> Envelope:
    spec = ArraySpec(shape, "BF16", "F32", 0.5)
    return Envelope(spec, "raw", 1, memoryview(payload), NOTHING, np.empty(0, NUMPY_DTYPES["BF16"]))


def _sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", xxhash.xxh64(body).intdigest() & 0xFFFFFFFF)


# Everything up to the patch of _plain(): magic, version, flags, dtype, source dtype, codec.
HEAD = b"MOEB" + bytes([1, 0, 0, 2, 3]) + b"raw" + bytes([1])
SHAPE = bytes([1, 2])
BOUND = struct.pack("<d", 0.5)
TAIL = bytes([0, 4]) + b"\x01\x02\x03\x04"


def test_every_byte_of_version_1() -> None:
    assert build(_plain()) == _sealed(HEAD + SHAPE + BOUND + TAIL)


def test_every_byte_of_a_patch() -> None:
    """Positions 3 and 9 of 20: l = floor(log2(20/2)) = 3 low bits each, then unary."""
    values = np.array([1.0, -2.0], NUMPY_DTYPES["BF16"])
    positions = np.array([3, 9], np.uint64)
    patched = replace(_plain((4, 5), b""), misses=positions, values=values, from_torch=True)
    lows = bytes([0b001_011])
    # High parts 0 and 1: ones at 0 + 0 and 1 + 1, of 2 + (20 >> 3) + 1 = 5 bits.
    highs = bytes([0b101])
    body = b"MOEB" + bytes([1, 1, 0, 2, 3]) + b"raw" + bytes([1, 2, 4, 5]) + BOUND
    body += bytes([2]) + lows + highs + b"\x80\x3f\x00\xc0" + bytes([0])
    assert build(patched) == _sealed(body)


@given(
    shape=st.lists(st.integers(0, 900), max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(DTYPES),
    bound=st.floats(0, 1e300),
    payload=st.binary(max_size=300),
    torch=st.booleans(),
    data=st.data(),
)
def test_there_and_back(
    shape: tuple[int, ...],
    dtype: str,
    source: str,
    bound: float,
    payload: bytes,
    torch: bool,
    data: st.DataObject,
) -> None:
    spec = ArraySpec(shape, dtype, source, bound)  # type: ignore[arg-type]
    chosen = st.sets(st.integers(0, max(0, spec.size - 1)), max_size=min(20, spec.size))
    positions = np.array(sorted(data.draw(chosen)), np.uint64)
    values = np.arange(len(positions)).astype(spec.numpy_dtype)
    sent = Envelope(spec, "bound_2", 7, memoryview(payload), positions, values, torch)
    found = parse(bytearray(build(sent)))
    assert (found.spec, found.codec, found.codec_version) == (spec, "bound_2", 7)
    assert (bytes(found.payload), found.from_torch) == (payload, torch)
    assert np.array_equal(found.misses, positions)
    assert np.array_equal(bits(found.values), bits(values))


def test_the_payload_is_a_view() -> None:
    data = bytearray(build(_plain()))
    found = parse(data)
    data[-5] ^= 0xFF
    assert found.payload[-1] == 4 ^ 0xFF


def test_checksum_is_the_low_half_of_xxh64() -> None:
    assert checksum(b"moebound") == xxhash.xxh64(b"moebound").intdigest() & 0xFFFFFFFF


@pytest.mark.parametrize("data", [b"", b"MOE", b"MOEB", b"MOEX\x01" + bytes(40), b"\x93NUMPY"])
def test_other_bytes_have_no_format(data: bytes) -> None:
    with pytest.raises(FormatError, match="begin with b'MOEB'"):
        parse(data)


def test_later_versions_say_so() -> None:
    with pytest.raises(FormatError, match="version 2: this moebound reads version 1"):
        parse(b"MOEB\x02" + bytes(30))


def test_wrong_checksum() -> None:
    data = bytearray(build(_plain()))
    data[-1] ^= 1
    with pytest.raises(CorruptionError, match="checksum"):
        parse(data)


def _varint(value: int) -> bytes:
    out = bytearray()
    put_varint(out, value)
    return bytes(out)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"MOEB\x01\x02\x00\x02\x03raw\x01" + SHAPE + BOUND + TAIL, "flags 2"),
        (b"MOEB\x01\x00\x03\x02\x03raw\x01" + SHAPE + BOUND + TAIL, "dtypes 3"),
        (b"MOEB\x01\x00\x00\x09\x03raw\x01" + SHAPE + BOUND + TAIL, "dtypes 0, 9"),
        (b"MOEB\x01\x00\x00\x02\x03r/w\x01" + SHAPE + BOUND + TAIL, "codec id"),
        (b"MOEB\x01\x00\x00\x02\x00\x01" + SHAPE + BOUND + TAIL, "codec id"),
        (b"MOEB\x01\x00\x00\x02\xffraw\x01" + SHAPE + BOUND + TAIL, "expected 255 more bytes"),
        (HEAD + b"\x09" + b"\x01" * 9 + BOUND + TAIL, "9 dimensions"),
        (HEAD + b"\x01" + b"\xff" * 9 + b"\x01" + BOUND + TAIL, "more than 63 bits"),
        (HEAD + b"\x02" + _varint(1 << 40) + b"\x02" + BOUND + TAIL, "out of range"),
        (HEAD + b"\x02\x00" + _varint(1 << 62) + BOUND + TAIL, "out of range"),
        (HEAD + SHAPE + struct.pack("<d", float("nan")) + TAIL, "out of range"),
        (HEAD + SHAPE + struct.pack("<d", float("inf")) + TAIL, "out of range"),
        (HEAD + SHAPE + struct.pack("<d", -0.5) + TAIL, "out of range"),
        (HEAD + SHAPE + BOUND + b"\x03" + TAIL, "patch of 3 values in an array of 2"),
        (HEAD + SHAPE + BOUND + b"\x02" + b"\x05", "expected 4 more bytes"),
        (HEAD + SHAPE + BOUND + b"\x00" + _varint(1 << 50), "expected 1125899906842624 more"),
        (HEAD + SHAPE + BOUND + TAIL + b"\x00", "1 bytes behind the payload"),
        (HEAD + SHAPE + BOUND[:3], "expected 8 more bytes"),
        (HEAD, "expected 2 more bytes|expected 1 more bytes"),
    ],
)
def test_contradictions_under_a_good_checksum(body: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(_sealed(body))
