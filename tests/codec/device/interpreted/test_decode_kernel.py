"""The kernels give the CPU's bits, on whatever a payload can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moebound import decode, encode
from moebound.codec.bound import BoundCodec
from moebound.codec.device import DecodeBatch, Schedule, decode_to, read_stream
from moebound.types import NUMPY_DTYPES, Array, DType

from ... import weights
from ...make_fixtures import CASES, Case
from ...stepped import Stepped, drawn_levels, odd
from .launching import MANY, decoded, patterns

CODEC = BoundCodec(segment_weights=1024)
MOST_STEPS, LONG_STEPS = 100, 1250
"""Of a stored example that decodes in seconds here; and in half a minute."""


def scaled(shape: tuple[int, int], dtype: DType = "BF16") -> Array:
    """Rows and columns of many scales: many tables."""
    rng = np.random.default_rng(3)
    values = 0.02 * rng.standard_normal(shape)
    values *= np.exp(rng.standard_normal((shape[0], 1)))
    values *= np.exp(0.5 * rng.standard_normal((1, shape[1])))
    return values.astype(NUMPY_DTYPES[dtype])


def with_oddities() -> Array:
    array = weights.gaussian((64, 512))
    array[0, 0], array[1, 1], array[40, 7], array[63, 511] = np.nan, np.inf, -np.inf, 1e30
    return array


def stepped(
    shape: tuple[int, int], dtype: DType = "BF16", *, bound: float = 0.02, spread: int = 9,
    by_row: bool = False, scale: float = 0.02, factors: int | None = None,
) -> bytes:  # fmt: skip
    """Version 2, with oddities; or 3, with factors of so many levels."""
    array = odd(weights.gaussian(shape, dtype, scale=scale))
    levels = drawn_levels(shape[0 if by_row else 1], spread)
    others = None if factors is None else drawn_levels(shape[1 if by_row else 0], factors, 1)
    made = Stepped.of(array, levels, bound, by_row=by_row, factors=others)
    return made.envelope(segment_weights=1024)


WIDE = (64, 512)
"""In 32 lanes: few steps to interpret."""


ENCODED = {
    "one table": encode(weights.gaussian((64, 512)), 0.005, codec=CODEC),
    "many tables": encode(scaled((64, 512)), 0.002, codec=CODEC),
    "columns of no whole group": encode(scaled((97, 345)), 0.002, codec=CODEC),
    "a ragged last row": encode(weights.gaussian((32801,)), 0.005, codec=CODEC),
    "low bits": encode(weights.gaussian((64, 512)), 0.0001, codec=CODEC),
    "low bits, ragged": encode(weights.gaussian((32801,)), 0.0001, codec=CODEC),
    "patches": encode(with_oddities(), 0.005, codec=CODEC),
    "float16": encode(weights.gaussian((64, 512), "F16"), 0.002, codec=CODEC),
    "float32": encode(weights.gaussian((64, 512), "F32"), 0.002, codec=CODEC),
    "float32 to bfloat16": encode(
        weights.gaussian((64, 512), "F32"), 0.002, codec=CODEC, dtype="BF16"
    ),
    "four lanes": encode(weights.gaussian((96, 96)), 0.005, codec=CODEC),
    "one lane": encode(weights.gaussian((3, 40)), 0.005, codec=CODEC),
    "one weight": encode(weights.gaussian((1,)), 0.005, codec=CODEC),
    "all zero": encode(np.zeros((64, 512), np.float16), 0.005, codec=CODEC),
    "steps": stepped(WIDE),
    "steps of rows": stepped(WIDE, by_row=True),
    "steps, one table": stepped(WIDE, spread=0),
    "steps, float16": stepped(WIDE, "F16", bound=2e-3),
    "steps, float16, denormals": stepped(WIDE, "F16", bound=1e-6, scale=1e-5),
    "steps, float32": stepped(WIDE, "F32", by_row=True),
    "steps, low bits": stepped((3, 20), bound=1e-4),
    "factors": stepped(WIDE, factors=9),
    "factors of columns": stepped(WIDE, factors=9, by_row=True),
    "factors, float16": stepped(WIDE, "F16", bound=2e-3, factors=30),
    "factors of columns, float16": stepped(WIDE, "F16", bound=2e-3, factors=30, by_row=True),
    "factors, float32": stepped(WIDE, "F32", factors=12),
    "factors of columns, float32": stepped(WIDE, "F32", factors=12, by_row=True),
    "exact copy": encode(weights.gaussian((2, 20)), 1e-12, codec=CODEC),
    "lossless bfloat16": encode(weights.gaussian((2, 20)), 1.0, codec="lossless"),
    "lossless float32": encode(weights.gaussian((2, 20), "F32"), 1.0, codec="lossless"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_the_same_bits(name: str) -> None:
    (found,) = decoded([ENCODED[name]])
    np.testing.assert_array_equal(found, patterns(decode(ENCODED[name])))


def stored(least: int, most: int) -> list[Case]:
    """Examples that are decoded in so many steps."""
    found = []
    for case in CASES:
        coded = read_stream(case.load().encoded).coded
        steps = coded.rows_per_segment * -(-coded.columns // (1 << coded.lanes_log)) if coded else 0
        if least <= steps <= most:
            found.append(case)
    return found


@pytest.mark.parametrize("case", stored(0, MOST_STEPS), ids=lambda case: case.name)
def test_stored_bytes(case: Case) -> None:
    fixture = case.load()
    (found,) = decoded([fixture.encoded])
    np.testing.assert_array_equal(found, patterns(fixture.decoded))


@pytest.mark.long
@pytest.mark.parametrize("case", stored(MOST_STEPS + 1, LONG_STEPS), ids=lambda case: case.name)
def test_stored_bytes_in_many_steps(case: Case) -> None:
    test_stored_bytes(case)


def test_everything_in_one_launch() -> None:
    """Dtypes, tables, low bits, patches and codecs mixed."""
    names = ("many tables", "low bits", "patches", "one weight", "steps, float16",
             "factors of columns", "factors, float32")  # fmt: skip
    data = [ENCODED[name] for name in names]
    data += [encode(weights.gaussian((9, 9), "F32"), 0.01, codec="raw")]
    for envelope, found in zip(data, decoded(data), strict=True):
        np.testing.assert_array_equal(found, patterns(decode(envelope)))


@pytest.mark.parametrize(
    "schedule",
    [Schedule(together=8, wide=True), Schedule(together=16, wide=False)],
    ids=repr,
)
def test_no_schedule_changes_a_bit(schedule: Schedule) -> None:
    data = ENCODED["many tables"]
    (found,) = decoded([data], schedule=schedule)
    np.testing.assert_array_equal(found, patterns(decode(data)))


@pytest.mark.parametrize("name", ["many tables", "low bits"])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_bytes_at_any_address(name: str, shift: int) -> None:
    (found,) = decoded([ENCODED[name]], offsets=[shift])
    np.testing.assert_array_equal(found, patterns(decode(ENCODED[name])))


def test_into_slots_of_one_tensor() -> None:
    """Gate and up projection stacked, as the experts' modules hold them."""
    gate, up = (weights.gaussian((64, 512), seed=seed) for seed in (1, 2))
    data = [encode(array, 0.005, codec=CODEC) for array in (gate, up)]
    batch = DecodeBatch.of(data)
    compressed = torch.zeros(batch.n_bytes, dtype=torch.uint8)
    batch.pack(data, compressed)
    experts = torch.full((2, 128, 512), 5.0, dtype=torch.bfloat16)
    batch.launch(compressed, [experts[1, :64], experts[1, 64:]], MANY).check()
    want = np.concatenate([patterns(decode(envelope)) for envelope in data])
    np.testing.assert_array_equal(patterns(experts[1]), want)
    assert bool((experts[0] == 5).all())


def test_decode_to_makes_tensors_of_the_arrays_shapes() -> None:
    data = [encode(weights.gaussian((2, 30)), 0.005), ENCODED["one weight"]]
    first, second = decode_to(data, "cpu")
    assert (first.shape, first.dtype) == ((2, 30), torch.bfloat16)
    np.testing.assert_array_equal(patterns(first), patterns(decode(data[0])))
    np.testing.assert_array_equal(patterns(second), patterns(decode(data[1])))
