"""Encoding on a device gives the CPU's bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moebound import encode
from moebound.codec.arrays import to_torch
from moebound.codec.bound import BoundCodec
from moebound.codec.device.encode import encode_on
from moebound.types import Array

from ... import weights

SEGMENT = 1024


def scaled() -> Array:
    rng = np.random.default_rng(3)
    values = 0.02 * rng.standard_normal((64, 512)) * np.exp(rng.standard_normal((64, 1)))
    return values.astype(weights.gaussian((1,)).dtype)


def odd() -> Array:
    array = weights.gaussian((64, 512))
    array[0, 0], array[1, 1], array[40, 7], array[63, 511] = np.nan, np.inf, -np.inf, 1e30
    return array


CASES: dict[str, tuple[Array, float]] = {
    "one table": (weights.gaussian((64, 512)), 0.005),
    "many tables": (scaled(), 0.002),
    "low bits": (weights.gaussian((64, 512)), 0.0001),
    "float16": (weights.gaussian((64, 512), "F16"), 0.002),
    "misses": (odd(), 0.005),
    "a ragged last row": (weights.gaussian((32801,)), 0.0003),
    "columns of no whole group": (weights.gaussian((97, 345)), 0.0003),
    "one lane": (weights.gaussian((3, 40)), 0.005),
    "one weight": (weights.gaussian((1,)), 0.005),
    "all zero": (np.zeros((64, 512), np.float16), 0.005),
    "nothing": (weights.gaussian((0, 8)), 0.005),
    "an exact copy is smaller": (weights.gaussian((4, 64)), 1e-9),
    "float32": (weights.gaussian((8, 8), "F32"), 0.001),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bytes(name: str) -> None:
    array, bound = CASES[name]
    tensor = to_torch(array)
    want = encode(tensor, bound, codec=BoundCodec(segment_weights=SEGMENT))
    assert encode_on(tensor, bound, segment_weights=SEGMENT, together=32) == want


def test_a_view_is_encoded_as_what_it_shows() -> None:
    tensor = to_torch(weights.gaussian((512, 64))).T
    assert not tensor.is_contiguous()
    want = encode(tensor, 0.005, codec=BoundCodec(segment_weights=SEGMENT))
    assert encode_on(tensor, 0.005, segment_weights=SEGMENT, together=32) == want
    assert tensor.dtype == torch.bfloat16
