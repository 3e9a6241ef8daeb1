"""The door: what is taken, as which dtype, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from moebound.codec.arrays import dtype_name, is_torch, to_numpy, to_torch, writable_view
from moebound.errors import CodecError
from moebound.types import NUMPY_DTYPES

from .weights import DTYPES, bits, gaussian

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (ml_dtypes.bfloat16, "BF16"),
        (torch.bfloat16, "BF16"),
        ("bfloat16", "BF16"),
        ("bf16", "BF16"),
        (np.float16, "F16"),
        (torch.half, "F16"),
        ("F16", "F16"),
        (np.dtype(">f4"), "F32"),
        ("float32", "F32"),
    ],
)
def test_dtype_names(dtype: Any, expected: str) -> None:
    if isinstance(dtype, type):
        dtype = np.dtype(dtype)
    assert dtype_name(dtype) == expected


@pytest.mark.parametrize(
    "dtype", [np.float64, np.int16, torch.int8, "float8_e4m3fn", "nonsense", ml_dtypes.float8_e5m2]
)
def test_other_dtypes_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(CodecError, match="expected bfloat16, float16 or float32"):
        dtype_name(np.dtype(dtype) if isinstance(dtype, type) else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_there_and_back_is_bit_exact(dtype: str) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    tensor = patterns.view(TORCH[dtype]) if dtype != "F32" else torch.randn(300)
    array = to_numpy(tensor)
    assert array.dtype == NUMPY_DTYPES[dtype]  # type: ignore[index]
    back = to_torch(array)
    assert back.dtype == tensor.dtype
    width = torch.int32 if dtype == "F32" else torch.int16
    assert torch.equal(back.view(width), tensor.view(width))


def test_contiguous_memory_is_shared_and_not_copied() -> None:
    tensor = torch.zeros(4, 5, dtype=torch.bfloat16)
    to_numpy(tensor)[1, 2] = 3.0
    assert tensor[1, 2] == 3.0
    array = gaussian((4, 5))
    assert np.shares_memory(to_numpy(array), array)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 4)])
def test_shapes_stay(shape: tuple[int, ...]) -> None:
    assert to_numpy(np.zeros(shape, np.float32)).shape == shape
    assert to_numpy(torch.zeros(shape, dtype=torch.bfloat16)).shape == shape


def test_strides_and_byte_order_are_straightened() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for odd in (array.T, array[::-1, ::2], array.astype(">f4")):
        found = to_numpy(odd)
        assert found.flags.c_contiguous
        assert found.dtype == np.float32
        assert np.array_equal(found, odd)
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert np.array_equal(to_numpy(tensor), tensor.numpy())


def test_tensors_that_need_gradients_are_taken() -> None:
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1.0, 1.0]


def test_is_torch() -> None:
    assert is_torch(torch.ones(1))
    assert not is_torch(np.ones(1))


@pytest.mark.parametrize("thing", [[1.0, 2.0], 3.0, None, b"abc"])
def test_things_that_are_no_array(thing: Any) -> None:
    with pytest.raises(CodecError, match=type(thing).__name__):
        to_numpy(thing)


def test_writable_view_is_flat_and_the_same_memory() -> None:
    array = np.zeros((2, 3), np.float16)
    writable_view(array, (2, 3), "F16")[4] = 7.0
    assert array[1, 1] == 7.0
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    writable_view(tensor, (2, 3), "BF16")[5] = 2.0
    assert tensor[1, 2] == 2.0


def _read_only() -> Any:
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((3, 2), np.float32), "expected shape"),
        (np.zeros((2, 3), np.float16), "expected shape"),
        (np.zeros((2, 3), ">f4"), "expected shape"),
        (np.zeros((3, 2), np.float32).T, "C-contiguous"),
        (_read_only(), "writable"),
        (torch.zeros(3, 2).T, "contiguous tensor"),
        (torch.zeros(2, 3, device="meta"), "on the CPU"),
        ([0.0] * 6, "found list"),
    ],
)
def test_out_that_does_not_fit(out: Any, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        writable_view(out, (2, 3), "F32")


def test_patterns_of_the_suite_are_what_they_say() -> None:
    assert bits(gaussian((3,), "BF16")).dtype == np.uint16
