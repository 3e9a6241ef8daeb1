"""ZFP: its tolerance, where it does not hold, and a stream that is never read past its end."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from moebound import decode, encode
from moebound.codec.base import ArraySpec
from moebound.codec.envelope import parse
from moebound.codec.zfp import ZfpCodec
from moebound.errors import BackendUnavailable, CodecError, CorruptionError
from moebound.types import Array

from .weights import broken, gaussian


def _there_and_back(array: Array, bound: float) -> Array:
    spec = ArraySpec(array.shape, "F32", "F32", bound)
    out = np.empty(spec.size, np.float32)
    ZfpCodec().decompress(memoryview(ZfpCodec().compress(array, spec).data), spec, out)
    return out.reshape(array.shape)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (3, 999), (999, 3), (64, 96), (8, 9, 10, 11)])
def test_tolerance_holds_on_weights(shape: tuple[int, ...]) -> None:
    array = gaussian(shape, "F32")
    error = np.abs(_there_and_back(array, 0.004) - array).max()
    assert error <= 0.004


def test_denormals_break_zfp_and_the_patch_mends_them() -> None:
    array = gaussian((16, 64), "F32", scale=1e-41)
    bound = 1e-43
    assert len(broken(array, _there_and_back(array, bound), bound))
    data = encode(array, bound, codec="zfp")
    assert len(parse(data).misses)
    assert not len(broken(array, np.asarray(decode(data)), bound))


def test_non_finite_values_are_patched_and_cost_their_block_nothing() -> None:
    array = gaussian((16, 64), "F32")
    array[::5, ::7] = np.nan
    array[2, 3] = -np.inf
    parsed = parse(encode(array, 0.004, codec="zfp"))
    assert list(parsed.misses) == list(np.flatnonzero(~np.isfinite(array)))


def test_huge_values() -> None:
    array = gaussian((16, 64), "F32", scale=6e37)
    assert not len(broken(array, _there_and_back(array, 1e33), 1e33))


def test_input_is_not_changed() -> None:
    array = gaussian((16, 64), "F32")
    array[3, 3] = np.nan
    ZfpCodec().compress(array, ArraySpec(array.shape, "F32", "F32", 0.1))
    assert np.isnan(array[3, 3])


def test_matrices_go_in_as_matrices() -> None:
    """Blocks of 4x4 share an exponent: on a smooth field 2-D is far smaller than 1-D."""
    rows, cols = np.mgrid[0:128, 0:128] / 40.0
    field = np.sin(rows * cols).astype(np.float32)
    n_flat = len(ZfpCodec().compress(field, ArraySpec((128 * 128,), "F32", "F32", 1e-3)).data)
    n_matrix = len(ZfpCodec().compress(field, ArraySpec((128, 128), "F32", "F32", 1e-3)).data)
    assert n_matrix < 0.8 * n_flat


def test_bound_zero_is_refused() -> None:
    with pytest.raises(CodecError, match="lossless"):
        ZfpCodec().compress(np.ones(4, np.float32), ArraySpec((4,), "F32", "F32", 0.0))


@pytest.mark.parametrize("n_bytes", [0, 1 << 14])
def test_impossible_lengths_raise(n_bytes: int) -> None:
    spec = ArraySpec((16, 64), "F32", "F32", 0.1)
    with pytest.raises(CorruptionError, match=f"found {n_bytes} "):
        ZfpCodec().decompress(memoryview(bytes(n_bytes)), spec, np.empty(1024, np.float32))


def test_the_longest_stream_fits_the_buffer() -> None:
    """Incompressible planes at the finest tolerance: no stream is refused as too long."""
    patterns = np.random.default_rng(0).integers(0, 1 << 32, (37, 41), np.uint32)
    array = np.nan_to_num(patterns.view(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    for shape in (array.shape, (array.size,), (37 * 41, 1)):
        spec = ArraySpec(shape, "F32", "F32", 5e-324)
        data = ZfpCodec().compress(array.reshape(shape), spec).data
        ZfpCodec().decompress(memoryview(data), spec, np.empty(array.size, np.float32))


def test_one_bits_for_ever_are_not_read_past_the_buffer() -> None:
    spec = ArraySpec((16, 64), "F32", "F32", 5e-324)
    out = np.empty(1024, np.float32)
    ZfpCodec().decompress(memoryview(b"\xff" * 4000), spec, out)
    again = np.empty(1024, np.float32)
    ZfpCodec().decompress(memoryview(b"\xff" * 4000), spec, again)
    assert np.array_equal(out.view(np.uint32), again.view(np.uint32))


def test_missing_zfpy_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zfpy", None)
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[peers\]'"):
        ZfpCodec().compress(np.ones(4, np.float32), ArraySpec((4,), "F32", "F32", 0.1))
