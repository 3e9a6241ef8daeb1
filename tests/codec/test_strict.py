"""The strict wrapper: whatever a codec breaks is found, patched, counted, or refused."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from moebound import decode, encode
from moebound.codec import registry
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.envelope import parse
from moebound.codec.raw import RawCodec
from moebound.codec.strict import within_bound
from moebound.errors import BoundError
from moebound.types import Array

from .weights import broken, gaussian


class Sloppy(Codec):
    """Right but for every tenth value, which comes back 1.5 bounds too high."""

    id: ClassVar[str] = "sloppy"

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        values = x.astype(np.float64).reshape(-1)
        values[::10] += 1.5 * spec.abs_bound
        return Payload(values.astype(np.float32).tobytes())

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        out[:] = np.frombuffer(data, np.float32)


class Listed(Sloppy):
    """Keeps its bound by saying itself where it does not; never decoded while encoding."""

    id: ClassVar[str] = "listed"
    keeps_bound: ClassVar[bool] = True

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        data = super().compress(x, spec).data
        return Payload(data, np.arange(0, spec.size, 10, dtype=np.uint64))

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        raise AssertionError("decoded")


@pytest.fixture(autouse=True)
def _known_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.CODECS.classes, "sloppy", Sloppy)


def test_what_broke_is_patched() -> None:
    array = gaussian((7, 11), "F32")
    data = encode(array, 0.001, codec="sloppy")
    parsed = parse(data)
    assert parsed.misses.tolist() == list(range(0, 77, 10))
    assert np.array_equal(parsed.values, array.reshape(-1)[::10])
    assert not len(broken(array, np.asarray(decode(data)), 0.001))


def test_patches_count() -> None:
    array = gaussian((7, 11), "F32")
    n_raw = len(encode(array, 0.001, codec=RawCodec()))
    n_sloppy = len(encode(array, 0.001, codec="sloppy"))
    # 8 patches of 4 bytes, their positions, "sloppy" for "raw".
    assert n_sloppy > n_raw + 8 * 4 + 3


def test_a_codec_that_keeps_its_bound_is_believed() -> None:
    array = gaussian((7, 11), "F32")
    payload, values = within_bound(Listed(), array, ArraySpec(array.shape, "F32", "F32", 0.001))
    assert payload.misses.tolist() == list(range(0, 77, 10))
    assert np.array_equal(values, array.reshape(-1)[::10])


def test_rounding_to_the_decoded_dtype_is_part_of_the_error() -> None:
    """257/256 is halfway between two bf16 numbers: float32 within 1e-3, bf16 not."""
    array = np.array([1.0, 257 / 256], np.float32)
    assert len(within_bound(RawCodec(), array, ArraySpec((2,), "F32", "F32", 1e-3))[1]) == 0
    with pytest.raises(BoundError, match=r"cannot be met in BF16: 1 values, the first at.* 1,"):
        within_bound(RawCodec(), array, ArraySpec((2,), "BF16", "F32", 1e-3))


@pytest.mark.parametrize("value", [70000.0, -1e30, 3.4e38])
def test_values_that_overflow_the_decoded_dtype(value: float) -> None:
    array = np.array([0.0, value], np.float32)
    with pytest.raises(BoundError, match="cannot be met in F16"):
        encode(array, 1.0, codec="raw", dtype="float16")


def test_non_finite_values_survive_the_cast() -> None:
    array = np.array([np.inf, -np.inf, np.nan, 1.0], np.float32)
    decoded = np.asarray(decode(encode(array, 0.1, codec="raw", dtype="float16")))
    assert np.array_equal(decoded, array.astype(np.float16), equal_nan=True)
