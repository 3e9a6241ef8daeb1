"""Integers as bytes: of a few bits each, one behind the other, or entropy-coded.

Packed, the lowest bit comes first, and there is no padding between. Coded, they are an array of
codec `bound`, F32, whose values are rounded to the nearest integer when they are read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.codec import decode_array, encode_certified, parse
from moebound.errors import CorruptionError
from moebound.types import Array, ErrorBound

_PIECE = 1 << 16
"""Integers whose bits are spread over bytes at a time; a multiple of 8."""

Codes = npt.NDArray[np.uint8]


def packed_bytes(count: int, bits: int) -> int:
    """What `count` integers of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Codes, bits: int) -> bytes:
    """codes: any shape, below 2^bits, bits from 1 to 8."""
    if bits == 8:
        return np.ascontiguousarray(codes).tobytes()
    flat, packed = codes.reshape(-1), bytearray()
    for at in range(0, len(flat), _PIECE):
        planes = (flat[at : at + _PIECE, None] >> np.arange(bits, dtype=np.uint8)) & 1
        packed += np.packbits(planes, bitorder="little").tobytes()
    return bytes(packed)


def unpack(data: memoryview, count: int, bits: int) -> Codes:
    """[count], the integers again. Raises CorruptionError for another number of bytes."""
    if len(data) != packed_bytes(count, bits):
        raise CorruptionError(
            f"expected {packed_bytes(count, bits)} bytes of {count} integers, found {len(data)}"
        )
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw
    if bits == 4:
        pairs = np.stack([raw & 15, raw >> 4], axis=1)
        return pairs.reshape(-1)[:count]
    found: Codes = np.empty(count, np.uint8)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    for at in range(0, count, _PIECE):
        here = found[at : at + _PIECE]
        some = raw[at * bits // 8 :][: packed_bytes(len(here), bits)]
        planes = np.unpackbits(some, count=len(here) * bits, bitorder="little")
        (planes.reshape(-1, bits) * weights).sum(axis=1, dtype=np.uint8, out=here)
    return found


def code(integers: Array, half: float) -> bytes:
    """integers: of any dtype that float32 holds exactly. half: the bound that they are encoded
    with, below 0.5, so that nothing is lost."""
    values = np.ascontiguousarray(integers, np.float32)
    return encode_certified(values, ErrorBound(half), codec="bound").data


def uncode(data: memoryview, shape: tuple[int, ...]) -> Array:
    """float32 of this shape, the integers again. Raises CorruptionError for another array."""
    envelope = parse(data)
    if envelope.spec.shape != shape or envelope.spec.dtype != "F32":
        raise CorruptionError(f"integers of shape {envelope.spec.shape} as {envelope.spec.dtype}")
    found = decode_array(envelope, threads=1, max_bytes=envelope.spec.n_bytes)
    np.rint(found, out=found)
    return found
