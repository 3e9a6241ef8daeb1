"""One native call does what the reference does to an envelope, or leaves it to the reference."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xxhash

import moebound
from moebound.codec import encode_codes, envelope, patch
from moebound.codec.api import decode_into
from moebound.codec.at_once import codes_at_once, decode_at_once
from moebound.codec.bound import EXACT, BoundCodec
from moebound.codec.codes import Bits, CodeMatrix, code_bytes, decode_codes
from moebound.errors import MoeboundError
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound

from .stepped import Stepped
from .weights import gaussian

SHAPES = [(70, 96), (61, 50), (300, 1)]


def _weights(shape: tuple[int, int], dtype: DType, n_misses: int) -> Array:
    weights = gaussian(shape, dtype).reshape(-1).copy()
    rng = np.random.default_rng(n_misses)
    at = rng.choice(weights.size, n_misses, replace=False)
    weights[at] = np.array([np.inf, -np.inf, np.nan] * weights.size, np.float32)[:n_misses]
    return weights.reshape(shape)


def _stepped(shape: tuple[int, int], by_row: bool, factors: bool) -> bytes:
    n, others = shape if by_row else shape[::-1]
    given = np.arange(others) % 5 if factors else None
    weights = _weights(shape, "BF16", 3)
    made = Stepped.of(weights, np.arange(n) % 7, 0.01, by_row=by_row, factors=given)
    bound = ErrorBound(made.bound, "abs")
    return encode_codes(made.weights, made.codes, made.steps, bound, made.bound).data


def _good() -> Iterator[tuple[str, bytes]]:
    dtypes: tuple[DType, ...] = ("BF16", "F16", "F32")
    for dtype in dtypes:
        for shape in SHAPES:
            for n_misses in (0, 1, 20, shape[0] * shape[1] // 12):
                data = moebound.encode(_weights(shape, dtype, n_misses), 0.004)
                yield f"{dtype} {shape} {n_misses} misses", data
    yield (
        "decoded to another dtype",
        moebound.encode(gaussian((61, 50), "F32"), 0.004, dtype="BF16"),
    )
    for by_row in (False, True):
        for factors in (False, True):
            yield f"steps, by row {by_row}, factors {factors}", _stepped((70, 33), by_row, factors)


GOOD = dict(_good())


def _by_reference(data: bytes, shape: tuple[int, ...], dtype: DType) -> bytes | None:
    """The weights' bits; None for what is refused, and for what the native call is not for."""
    try:
        parsed = envelope.parse(data)
        if (parsed.spec.shape, parsed.spec.dtype, parsed.codec) != (shape, dtype, BoundCodec.id):
            return None
        if not len(parsed.payload) or parsed.payload[0] == EXACT:
            return None
        out = np.empty(parsed.spec.size, NUMPY_DTYPES[dtype])
        decode_into(parsed, out, threads=1)
    except MoeboundError:
        return None
    return out.tobytes()


def _at_once(data: bytes, shape: tuple[int, ...], dtype: DType, threads: int = 1) -> bytes | None:
    out = np.zeros(int(np.prod(shape)), NUMPY_DTYPES[dtype])
    return out.tobytes() if decode_at_once(data, out, shape, threads=threads) else None


def _parts(matrix: CodeMatrix) -> list[Any]:
    arrays = (matrix.codes, matrix.table, matrix.steps, matrix.factors, matrix.patched)
    weights = matrix.patch_weights.view(np.uint32)
    found = [array.tobytes() for array in (*arrays, weights)]
    return [*found, matrix.by_row, matrix.first, matrix.shape, matrix.dtype, matrix.bits]


def _codes_by_reference(data: bytes, bits: Bits = 8) -> list[Any] | None:
    try:
        parsed = envelope.parse(data)
        rows, cols = parsed.spec.shape
        out = np.zeros(code_bytes((rows, cols), bits), np.uint8)
        return _parts(decode_codes(parsed, out, bits=bits))
    except MoeboundError:
        return None


def _codes_at_once(
    data: bytes, shape: tuple[int, ...], dtype: DType, bits: Bits = 8
) -> list[Any] | None:
    rows, cols = shape
    out = np.zeros(code_bytes((rows, cols), bits), np.uint8)
    found = codes_at_once(data, out, (rows, cols), dtype, bits=bits, threads=1)
    return None if found is None else _parts(found)


@pytest.mark.parametrize("name", GOOD)
def test_the_same_weights_and_the_same_codes(name: str) -> None:
    data = GOOD[name]
    spec = envelope.parse(data).spec
    expected = _by_reference(data, spec.shape, spec.dtype)
    assert expected is not None
    for threads in (1, 3):
        assert _at_once(data, spec.shape, spec.dtype, threads) == expected
    assert _codes_at_once(data, spec.shape, spec.dtype) == _codes_by_reference(data)
    # The coder sees one column as a row; rows of four bits are then left to the reference.
    packed = None if spec.shape[1] == 1 else _codes_by_reference(data, 4)
    assert _codes_at_once(data, spec.shape, spec.dtype, 4) == packed


def test_there_were_codes_to_compare() -> None:
    assert sum(_codes_by_reference(data) is not None for data in GOOD.values()) > len(GOOD) // 2


def _sealed(body: bytes | bytearray) -> bytes:
    return bytes(body) + struct.pack("<I", xxhash.xxh64(bytes(body)).intdigest() & 0xFFFFFFFF)


def _damaged(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Most with a checksum that is right, so that what stands behind it has to say no."""
    head = data.index(b"bound") + 40
    for at in (*range(head), *rng.integers(head, len(data) - 4, 60).tolist()):
        body = bytearray(data[:-4])
        body[at] ^= 1 << int(rng.integers(8))
        yield _sealed(body)
        yield bytes(body) + data[-4:]
    for at in (0, 3, 4, 8, 9, *rng.integers(9, len(data) - 4, 10).tolist()):
        yield data[:at]
        yield _sealed(data[:at])
    yield _sealed(data[:-4] + b"\0")
    yield data + b"\0"


@pytest.mark.parametrize("name", [
    "BF16 (61, 50) 20 misses", "F32 (70, 96) 0 misses", "F16 (300, 1) 25 misses",
    "BF16 (300, 1) 1 misses", "steps, by row True, factors True",
])  # fmt: skip
def test_damage_is_refused_where_the_reference_refuses_it(name: str) -> None:
    data = GOOD[name]
    spec = envelope.parse(data).spec
    refused = taken = 0
    for damaged in _damaged(data, np.random.default_rng(7)):
        expected = _by_reference(damaged, spec.shape, spec.dtype)
        assert _at_once(damaged, spec.shape, spec.dtype) == expected
        if expected is not None:  # such as another bit in a segment
            assert _codes_at_once(damaged, spec.shape, spec.dtype) == _codes_by_reference(damaged)
        refused += expected is None
        taken += expected is not None
    assert refused > 20
    assert taken > 5


def test_patches_that_are_not_ascending_or_too_many() -> None:
    """Every position byte of a small patch, every value of it, under a right checksum."""
    data = moebound.encode(_weights((9, 40), "BF16", 5), 0.004)
    spec, n_misses = envelope.parse(data).spec, len(envelope.parse(data).misses)
    at = data.index(b"bound") + 5 + 1 + 1 + 2 + 8  # version, dimensions, extents, bound
    assert data[at] == n_misses >= 5
    assert _at_once(data, spec.shape, spec.dtype) is not None
    for place in range(at, at + 1 + patch.positions_n_bytes(spec.size, n_misses)):
        for value in range(256):
            body = bytearray(data[:-4])
            body[place] = value
            damaged = _sealed(body)
            expected = _by_reference(damaged, spec.shape, spec.dtype)
            assert _at_once(damaged, spec.shape, spec.dtype) == expected


def test_what_is_left_to_the_reference() -> None:
    weights = gaussian((61, 50))
    data = moebound.encode(weights, 0.004)
    parsed = envelope.parse(data)
    assert _at_once(data, (61, 50), "BF16") is not None
    assert _at_once(data, (50, 61), "BF16") is None
    assert _at_once(data, (61, 50, 1), "BF16") is None
    assert _at_once(data, (61, 50), "F16") is None
    assert _codes_at_once(data, (61, 50), "F16") is None
    for codec in ("raw", "lossless"):
        assert _at_once(moebound.encode(weights, 0.004, codec=codec), (61, 50), "BF16") is None
    exact = moebound.encode(_weights((61, 50), "BF16", 1525), 0.004)
    assert envelope.parse(exact).payload[0] == EXACT
    assert _at_once(exact, (61, 50), "BF16") is None
    newer = envelope.build(replace(parsed, codec_version=BoundCodec.newest() + 1))
    assert _at_once(newer, (61, 50), "BF16") is None
    assert not decode_at_once(data, np.empty(3049, NUMPY_DTYPES["BF16"]), (61, 50), threads=1)


def test_memory_that_is_read_is_not_written_to() -> None:
    data = moebound.encode(gaussian((61, 50)), 0.004)
    both = np.zeros(2 * 61 * 50 + len(data), np.uint8)
    both[-len(data) :] = np.frombuffer(data, np.uint8)
    before = both.copy()
    out = both[100 : 100 + 2 * 61 * 50].view(NUMPY_DTYPES["BF16"])
    overlapping = both.data[-len(data) :]
    assert len(overlapping) + len(out) * 2 + 100 > len(both)
    assert not decode_at_once(overlapping, out, (61, 50), threads=1)
    assert (both == before).all()
