"""Sums that come out the same however they are summed up, and functions that are IEEE's alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.codec.fields import FieldReader
from moebound.errors import CorruptionError, MethodError
from moebound.methods import compress, get_method
from moebound.methods.bases.assignment import assign
from moebound.methods.bases.exact import (
    WIDTHS,
    Function,
    apply,
    dense_part,
    limit,
    open_dense,
    product_bytes,
    take_dense,
    take_product,
    write_dense,
    write_product,
)
from moebound.methods.reading import OpenPart, Stored
from moebound.types import ErrorBound, ExpertKey

from .made import layer


def read(data: bytes) -> FieldReader:
    return FieldReader(memoryview(data), 0)


def factors(rows: int, rank: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.exp(-np.arange(rank) / 4)
    return rng.standard_normal((rows, rank)) * sizes, rng.standard_normal((rank, cols))


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), rank=st.integers(0, 12),
       bits=st.sampled_from(WIDTHS), seed=st.integers(0, 999))  # fmt: skip
def test_a_product_by_fractions(rows: int, cols: int, rank: int, bits: int, seed: int) -> None:
    """Against the formula of docs/format-method.md, in exact arithmetic."""
    data = write_product(*factors(rows, rank, cols, seed), bits)
    found = take_product(read(data), (rows, cols))
    if not rank:
        assert not found.any()
        return
    at = 2
    (unit,) = np.frombuffer(data[at : at + 4], "<f4")
    exponents, at = data[at + 4 : at + 4 + rank], at + 4 + rank
    n_left = (rows * rank * bits + 7) // 8

    def whole(part: bytes, count: int) -> list[int]:
        number = int.from_bytes(part, "little")
        codes = [number >> i * bits & (1 << bits) - 1 for i in range(count)]
        if bits == 16:
            return [c - (1 << 16) if c >> 15 else c for c in codes]
        return [c - (1 << bits - 1) for c in codes]

    a = whole(data[at : at + n_left], rows * rank)
    b = whole(data[at + n_left :], rank * cols)
    for i in range(rows):
        for j in range(cols):
            total = sum(a[i * rank + k] * b[k * cols + j] << exponents[k] for k in range(rank))
            assert abs(total) < 1 << 53
            # One rounding, of the product.
            assert Fraction(found[i, j]) == Fraction(float(total) * float(unit))


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_order_of_the_sum_changes_a_bit(bits: int) -> None:
    """Ranks in turn, in blocks, backwards, and by the library: the same. In float32 they differ."""
    left, right = factors(40, 64, 50)
    data = write_product(left, right, bits)
    want = take_product(read(data), (40, 50))
    at = 2
    unit = np.float64(np.frombuffer(data[at : at + 4], "<f4")[0])
    exponents = np.frombuffer(data[at + 4 : at + 68], np.uint8).astype(int)
    rest = FieldReader(memoryview(data), at + 68)
    from moebound.methods.bases.exact import take_signed

    a = np.ldexp(take_signed(rest, (40, 64), bits).astype(np.float64), exponents)
    b = take_signed(rest, (64, 50), bits).astype(np.float64)
    for order in (range(64), range(63, -1, -1), np.random.default_rng(1).permutation(64)):
        total = np.zeros((40, 50))
        for k in order:
            total += a[:, k, None] * b[k]
        assert (total * unit).tobytes() == want.tobytes()
    blocks = sum(a[:, k : k + 7] @ b[k : k + 7] for k in range(0, 64, 7))
    assert (blocks * unit).tobytes() == want.tobytes()
    as_f32 = [
        a.astype(np.float32)[:, order] @ b.astype(np.float32)[order]
        for order in (np.arange(64), np.arange(64)[::-1])
    ]
    assert bits < 8 or not np.array_equal(*as_f32)


@pytest.mark.parametrize(("bits", "most"), [(16, 1e-4), (8, 0.015), (6, 0.06), (4, 0.3)])
def test_what_rounding_costs(bits: int, most: float) -> None:
    left, right = factors(60, 50, 90)
    data = write_product(left, right, bits)
    found = take_product(read(data), (60, 90))
    assert np.linalg.norm(found - left @ right) <= most * np.linalg.norm(left @ right)
    assert len(data) == product_bytes((60, 90), 50, bits) + 6


def test_numbers_of_any_size() -> None:
    left, right = factors(6, 5, 7)
    left[:, 0] *= 1e30
    right[0] *= 1e-30
    left[:, 3] = 0
    right[4] = 0
    found = take_product(read(write_product(left, right, 16)), (6, 7))
    np.testing.assert_allclose(found, left @ right, atol=2e-4)
    with pytest.raises(MethodError, match="not finite"):
        write_product(np.full((6, 5), np.inf), right, 16)


def test_every_sum_is_below_2_to_the_53() -> None:
    for bits in WIDTHS:
        for rank in (1, 2, 3, 559, 1024, 7000):
            top = (1 << (bits - 1)) - 1
            assert limit(bits, rank) >= 9
            assert rank * (top * top << limit(bits, rank)) < 1 << 53


@pytest.mark.parametrize("function", ["tanh", "silu"])
def test_functions(function: Function) -> None:
    x = np.concatenate([np.linspace(-40, 40, 100_001), [0.0, -0.0, 1e-300, -1e-300, 800, -800]])
    with np.errstate(over="ignore"):
        want = np.tanh(x) if function == "tanh" else x / (1 + np.exp(-x))
    np.testing.assert_allclose(apply(function, x), want, rtol=1e-14, atol=1e-16)


def test_functions_are_sums_and_products() -> None:
    """Some values, written down: a machine that gives others rounds otherwise than IEEE 754."""
    x = np.array([0.3, -1.7, 5.5, -12.25])
    assert [v.hex() for v in apply("tanh", x)] == TANH
    assert [v.hex() for v in apply("silu", x)] == SILU


TANH = [
    "0x1.2a4dda7d914f9p-2",
    "-0x1.deedf00d3e7f4p-1",
    "0x1.fffb9f2fc1e92p-1",
    "-0x1.ffffffff9b4bfp-1",
]
SILU = [
    "0x1.60effed787fdap-3",
    "-0x1.0ce4a464ee920p-2",
    "0x1.5e913b53fa3e6p+2",
    "-0x1.ebb7ec9a3bbc3p-15",
]


@pytest.mark.parametrize("bits", WIDTHS)
def test_whole_matrices(bits: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    data = write_dense(matrix, bits)
    found = take_dense(read(data), (200, 300))
    error = np.linalg.norm(found - matrix) / np.linalg.norm(matrix)
    # A uniform step of 2^-b √(2πe), and its error; 2 bits are few for that.
    assert error <= (0.003 if bits == 16 else 1.25 * 4.1327 / 2**bits / 12**0.5)
    assert 8 * len(data) / matrix.size == pytest.approx(bits, rel=0.05)
    part = dense_part(matrix, bits)
    assert open_dense(memoryview(part.data)).tobytes() == found.tobytes()
    assert part.held_bytes == found.nbytes


@given(at=st.integers(0, 10**6), value=st.integers(0, 255), bits=st.sampled_from((4, 16)))
def test_damaged_products(at: int, value: int, bits: int) -> None:
    data = bytearray(write_product(*factors(5, 3, 6), bits))
    data[at % len(data)] = value
    for some in (bytes(data), bytes(data[: at % len(data)])):
        with suppress(CorruptionError):
            assert take_product(read(some), (5, 6)).shape == (5, 6)


# Assignment


@given(n=st.integers(1, 6), seed=st.integers(0, 999), ties=st.booleans())
def test_the_best_assignment(n: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 4, (n, n)).astype(float) if ties else rng.standard_normal((n, n))
    found = assign(cost)
    assert sorted(found) == list(range(n))
    best = min(sum(cost[i, j] for i, j in enumerate(p)) for p in permutations(range(n)))
    assert cost[np.arange(n), found].sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("n", [40, 300])
def test_a_large_assignment_is_the_one_that_was_hidden(n: int) -> None:
    rng = np.random.default_rng(n)
    rows, order = rng.standard_normal((n, 20)), rng.permutation(n)
    others = np.empty_like(rows)
    others[order] = rows + 0.02 * rng.standard_normal(rows.shape)
    assert np.array_equal(assign(-rows @ others.T), order)


# What was written stays readable

FIXTURE = Path(__file__).parent / "fixtures" / "payloads-1.json"
SETTINGS = [
    "svd:r3", "svd:r3:f6", "moe_i2_re:r3", "soco_lite:b9:f8", "d2_moe_fixed:r2:base5",
    "rfid_re:b14",
    "mobe_fixed:r4:s2:f8", "mobe_fixed:r4:s2:silu", "resmoe_fixed:k0.2", "milo_fixed:r2:int3:f4",
    "modegpt_re:k0.5:q4", "residual:d2_moe_fixed:r2:f8", "residual:calibrated:svd:r1",
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_bytes_of_version_1_decode_to_the_same_bits(setting: str) -> None:
    """Written on one machine, once; decoded on any to the weights that it had, bit for bit."""
    stored = json.loads(FIXTURE.read_text(encoding="utf-8"))[setting]
    parts = [OpenPart.of(bytes.fromhex(part), 0, i) for i, part in enumerate(stored["parts"])]
    for role, one in stored["matrices"].items():
        found = Stored.of(bytes.fromhex(one["data"])).decode(lambda _, i: parts[i])
        assert hashlib.sha256(found.tobytes()).hexdigest() == one["sha256"], role


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["Prescott", "Nehalem"])
def test_other_machines_products(kernels: str) -> None:
    """The same bits with the matrix products of older processors, where NumPy has OpenBLAS's."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "version_1 or no_order"]
    env = {**os.environ, "OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": "2"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def write_fixture() -> None:
    """How it was made. It is never written again."""
    found = {}
    for setting in SETTINGS:
        bound = ErrorBound(0.3, "rate") if setting.startswith("residual") else None
        artifact = compress(get_method(setting), layer(3, 6, 10, bound=bound))
        matrices = artifact.experts[ExpertKey(3, 1)]
        found[setting] = {
            "parts": [part.hex() for part in artifact.shared],
            "matrices": {
                role: {
                    "data": m.data.hex(),
                    "sha256": hashlib.sha256(m.decoded.tobytes()).hexdigest(),
                }
                for role, m in matrices.items()
            },
        }
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
