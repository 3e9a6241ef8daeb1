"""Experts with a gate, computed from codes: those of the reference, to the bit, in any company."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from moebound import _native
from moebound.codec.codes import Bits, CodeMatrix, GatedExpert, gated_experts
from moebound.codec.reference.product import gated, silu
from moebound.codec.reference.product import product as reference
from moebound.types import NUMPY_DTYPES, Array, DType

from .kernel import ISAS, flat, using
from .test_codes import codes_of, encoded, in_bits, patched, values_of

Matrices = tuple[CodeMatrix, CodeMatrix | None, CodeMatrix]
WIDTH, INNER = 50, 61


def matrix(kind: str, shape: tuple[int, int], bits: Bits = 8) -> CodeMatrix:
    return in_bits(patched(codes_of(encoded(kind, shape))), bits)


def rows(n: int, dtype: DType, width: int = WIDTH) -> Array:
    drawn = np.random.default_rng(n).standard_normal((n, width)) * 4
    return drawn.astype(np.float32).astype(NUMPY_DTYPES[dtype])


def compute(expert: Matrices, x: Array, threads: int = 1) -> Array:
    out = np.zeros((len(x), expert[2].shape[0]), x.dtype)
    gated_experts([GatedExpert(*expert, 0, len(x), 0)], flat(x), flat(out), threads=threads)
    return out


def times(matrix: CodeMatrix, x: Array) -> Array:
    sums = reference(
        values_of(matrix)[1], x.astype(np.float32), matrix.patched, matrix.patch_weights
    )
    with np.errstate(over="ignore", invalid="ignore"):
        return sums.astype(x.dtype)


def units(*columns: int) -> CodeMatrix:
    """One row that picks this of two columns; [1, 1] where none is named."""
    codes = np.array([[at in columns for at in range(2)] if columns else [1]], np.uint8)
    none = np.empty(0, np.float32)
    return CodeMatrix(codes.reshape(-1), (1, codes.size), "BF16", np.array([0, 1], np.float32),
                      none, False, 0, np.empty(0, np.uint32), none)  # fmt: skip


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["grid", "columns, factors"])
def test_experts_are_those_of_the_reference(kind: str, bits: Bits, dtype: DType) -> None:
    gate, up = matrix(kind, (INNER, WIDTH), bits), matrix("rows", (INNER, WIDTH), bits)
    down, x = matrix(kind, (70, INNER), bits), rows(5, dtype)
    expected = times(down, gated(times(gate, x), times(up, x)))
    for isa in ISAS:
        with using(isa):
            for threads in (1, 3):
                found = compute((gate, up, down), x, threads)
                np.testing.assert_array_equal(found, expected)
            alone = [compute((gate, up, down), x[t : t + 1]) for t in range(len(x))]
        assert np.concatenate(alone).tobytes() == found.tobytes()


def test_gate_and_up_in_one_matrix() -> None:
    both, down, x = matrix("grid", (70, WIDTH)), matrix("grid", (61, 35)), rows(3, "BF16")
    inner = times(both, x)
    expected = times(down, gated(inner[:, :35], inner[:, 35:]))
    np.testing.assert_array_equal(compute((both, None, down), x), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_experts_together_are_each_by_itself(isa: str) -> None:
    shapes = (INNER, WIDTH), (INNER, WIDTH), (70, INNER)
    made = [[matrix(kind, shape) for shape in shapes] for kind in ("grid", "rows")]
    first, other = ((gate, up, down) for gate, up, down in made)
    x = rows(40, "BF16")
    given: list[tuple[Matrices, int, int]] = [(first, 0, 33), (other, 33, 1), (first, 0, 1),
                                         (other, 5, 0), (other, 30, 10)]  # fmt: skip
    with using(isa):
        alone = [compute(expert, x[at : at + n]) for expert, at, n in given]
        for threads in (1, 3):
            out, jobs, row = np.zeros((45, 70), x.dtype), list[GatedExpert](), 0
            for expert, at, n in given:
                jobs.append(GatedExpert(*expert, at * WIDTH, n, row * 70))
                row += n
            gated_experts(jobs, flat(x), flat(out), threads=threads)
            assert out.tobytes() == np.concatenate(alone).tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_silu_of_every_bfloat16(isa: str) -> None:
    """The reference's, to the bit; torch's but for three numbers between -89 and -87, where torch
    has e-37 and we have 0."""
    every = np.arange(1 << 16, dtype=np.uint16)
    values = every.view(ml_dtypes.bfloat16)
    finite = np.isfinite(values.astype(np.float32))
    one, other = units(0), units(1)
    x = np.stack([values[finite], np.ones_like(values[finite])], axis=1)
    with using(isa):
        found = compute((one, other, units()), x)[:, 0]
        odd = compute((units(), units(), units()), values[~finite, None])[:, 0]
    np.testing.assert_array_equal(found, gated(x[:, 0], x[:, 1]))
    assert every[~finite][0] == 0x7F80
    assert np.isposinf(odd[:1].astype(np.float32))
    assert np.isnan(odd[1:].astype(np.float32)).all()
    assert np.isnan(gated(values[~finite], values[~finite])[1:].astype(np.float32)).all()
    by_torch = torch.nn.functional.silu(torch.from_numpy(every[finite]).view(torch.bfloat16))
    expected = by_torch.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    differs = found != expected
    assert sorted(x[differs, 0].tolist()) == [-88.5, -88, -87.5]


def test_silu_is_near_that_of_float64() -> None:
    x = np.linspace(-87, 90, 400_001).astype(np.float32)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    off = np.abs(silu(x) - exact) <= 2.3e-7 * np.abs(exact)
    assert off.all()
    below = silu(np.array([-87.1, -1e30, -np.inf, np.inf, np.nan, -0.0], np.float32))
    np.testing.assert_array_equal(below, [-0.0, -0.0, np.nan, np.inf, np.nan, -0.0])
    assert np.signbit(below[[0, 5]]).all()


def test_what_does_not_fit_is_refused() -> None:
    gate, up, down = matrix("grid", (35, 33)), matrix("rows", (35, 33)), matrix("grid", (70, 35))
    both = matrix("grid", (70, 33))
    x, out = np.zeros(66, np.float32), np.zeros(150, np.float32)
    gated_experts(
        [GatedExpert(gate, up, down, 33, 1, 80), GatedExpert(both, None, down, 0, 1, 0)], x, out
    )
    for place in ((34, 1, 0), (0, 3, 0), (0, 1, 81), (0, 2, 11), (2**63, 1, 0), (0, 1, 2**63)):
        with pytest.raises(ValueError, match=r"x|out"):
            gated_experts([GatedExpert(gate, up, down, *place)], x, out)
    wrong: list[Matrices] = [
        (gate, down, down), (gate, up, up), (gate, None, down), (both, None, both),
    ]  # fmt: skip
    for bad in wrong:
        with pytest.raises(ValueError, match=r"up|down"):
            gated_experts([GatedExpert(*bad, 0, 1, 0)], x, out)
    with pytest.raises(ValueError, match="out"):
        gated_experts([], x, out.astype(np.float16))
    with pytest.raises(TypeError):
        _native.gated_experts([(None, None, down._kernel, 0, 1, 0)], x, out, 1)  # type: ignore[attr-defined]
