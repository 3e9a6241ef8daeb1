"""Codes stand for the weights that decoding gives, and products of them are the same everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import moebound
from moebound import _native
from moebound.codec import encode_codes, envelope
from moebound.codec.codes import (
    Bits,
    CodeMatrix,
    Product,
    code_bytes,
    decode_codes,
    has_codes,
    most_outside,
    packed,
    products,
)
from moebound.codec.reference.product import fma
from moebound.codec.reference.product import product as reference
from moebound.errors import CodecError, CorruptionError
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound

from .kernel import ISAS, flat, using
from .stepped import Stepped
from .weights import gaussian

KINDS = ["grid", "rows", "columns", "rows, factors", "columns, factors"]
SHAPES = [(70, 96), (61, 50), (70, 33), (300, 1)]


def drawn(shape: tuple[int, int], dtype: DType = "BF16", *, infinite: bool = True) -> Array:
    weights = (np.random.default_rng(sum(shape)).standard_normal(shape) * 0.02).astype(np.float32)
    weights = weights.astype(NUMPY_DTYPES[dtype])
    if infinite:
        weights[0, 0], weights[-1, -1] = -np.inf, np.inf
    return weights


def encoded(kind: str, shape: tuple[int, int], dtype: DType = "BF16") -> bytes:
    weights = drawn(shape, dtype)
    if kind == "grid":
        return moebound.encode(weights, 0.004)
    by_row = kind.startswith("rows")
    n, others = shape if by_row else shape[::-1]
    factors = np.arange(others) % 5 if kind.endswith("factors") else None
    made = Stepped.of(weights, np.arange(n) % 7, 0.01, by_row=by_row, factors=factors)
    bound = ErrorBound(made.bound, "abs")
    return encode_codes(made.weights, made.codes, made.steps, bound, made.bound).data


def codes_of(data: bytes, threads: int = 1, bits: Bits = 8) -> CodeMatrix:
    parsed = envelope.parse(data)
    rows, cols = parsed.spec.shape if len(parsed.spec.shape) == 2 else (1, parsed.spec.size)
    out = np.full(code_bytes((rows, cols), bits), 255, np.uint8)
    return decode_codes(parsed, out, bits=bits, threads=threads)


def in_bits(matrix: CodeMatrix, bits: Bits) -> CodeMatrix:
    """The same, in codes of so many bits."""
    return packed(matrix, np.empty(code_bytes(matrix.shape, 4), np.uint8)) if bits == 4 else matrix


def patched(matrix: CodeMatrix) -> CodeMatrix:
    """The same with finite patches: in the first place, in the last, and two in a row."""
    places = np.array([0, 1, len(matrix.codes) // 2, len(matrix.codes) - 1], np.uint32)
    codes = matrix.codes.copy()
    codes[places.astype(np.int64)] = -matrix.first
    weights = np.array([3, -2.5, 0.125, 1], np.float32)
    return replace(matrix, codes=codes, patched=places, patch_weights=weights)


def values_of(matrix: CodeMatrix) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """All weights, and those that are not patched."""
    patterns = matrix.weights()
    parts = [matrix.weights(at, min(at + 3, len(patterns)), threads=2)
             for at in range(0, len(patterns), 3)]  # fmt: skip
    assert np.concatenate(parts).tobytes() == patterns.tobytes()
    dtype = NUMPY_DTYPES[matrix.dtype]
    values = patterns.view(dtype).astype(np.float32)
    plain = values.copy()
    plain.reshape(-1)[matrix.patched.astype(np.int64)] = 0
    return values, plain


def multiply(matrix: CodeMatrix, x: Array, threads: int = 1) -> Array:
    rows, columns = matrix.shape
    assert x.shape[1] == columns
    out = np.zeros((len(x), rows), x.dtype)
    matrix.product(flat(x), flat(out), stride=rows, threads=threads)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_stand_for_what_decoding_gives(
    shape: tuple[int, int], kind: str, dtype: DType, isa: str
) -> None:
    data = encoded(kind, shape, dtype)
    with using(isa):
        found = codes_of(data, threads=2).weights()
        in_halves = codes_of(data, threads=2, bits=4)
        expected: Any = moebound.decode(data)
    assert found.tobytes() == expected.tobytes()
    assert in_halves.weights().tobytes() == expected.tobytes()
    assert len(in_halves.codes) == shape[0] * ((shape[1] + 1) // 2)
    with using("scalar"):
        assert codes_of(data).codes.tobytes() == codes_of(data).codes.tobytes()
        scalar = codes_of(data).codes
    with using(isa):
        assert codes_of(data).codes.tobytes() == scalar.tobytes()


@pytest.mark.parametrize(("bound", "low_bits"), [(0.02, False), (0.0005, True)])
def test_alphabets_with_low_bits_and_without(bound: float, low_bits: bool) -> None:
    weights = gaussian((300, 128), scale=0.02)
    data = moebound.encode(weights, bound)
    plan = _native.bound_plan(envelope.parse(data).payload, weights.size, 0, 0, bound)
    for isa in ISAS:
        with using(isa):
            found = codes_of(data)
        assert found.weights().tobytes() == moebound.decode(data).tobytes()  # type: ignore[union-attr]
        assert len(found.table) == max(len(plan["values"]), 1 - found.first)


@pytest.mark.parametrize("n_tokens", [1, 2, 7])
@pytest.mark.parametrize("x_dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_the_reference(
    bits: Bits, shape: tuple[int, int], kind: str, dtype: DType, x_dtype: DType, n_tokens: int
) -> None:
    data = encoded(kind, shape, dtype)
    matrix = in_bits(patched(codes_of(data)), bits)
    x = np.random.default_rng(1).standard_normal((n_tokens, shape[1])).astype(np.float32)
    x = x.astype(NUMPY_DTYPES[x_dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference(
            values_of(matrix)[1], x.astype(np.float32), matrix.patched, matrix.patch_weights
        ).astype(x.dtype)
    found = []
    for isa in ISAS:
        with using(isa):
            found += [multiply(matrix, x), multiply(matrix, x, threads=3)]
            # A token alone is summed as among others.
            found.append(np.concatenate([multiply(matrix, x[t : t + 1]) for t in range(n_tokens)]))
    np.testing.assert_array_equal(found[0], expected)
    for other in found[1:]:
        assert other.tobytes() == found[0].tobytes()


def test_products_are_near_the_exact_ones() -> None:
    weights = drawn((200, 1000), infinite=False)
    matrix = codes_of(moebound.encode(weights, 0.003))
    x = np.random.default_rng(2).standard_normal((3, 1000)).astype(np.float32)
    values = values_of(matrix)[0].astype(np.float64)
    sums = np.abs(x.astype(np.float64)) @ np.abs(values).T
    assert (
        np.abs(multiply(matrix, x) - x.astype(np.float64) @ values.T) <= 64 * 2**-24 * sums
    ).all()


@pytest.mark.parametrize("n_tokens", [3, 4, 5, 8, 9])
@pytest.mark.parametrize("kind", ["grid", "columns"])
@pytest.mark.parametrize("bits", [8, 4])
def test_however_many_tokens_each_is_summed_as_alone(bits: Bits, kind: str, n_tokens: int) -> None:
    matrix = in_bits(patched(codes_of(encoded(kind, (61, 50)))), bits)
    x = np.random.default_rng(n_tokens).standard_normal((n_tokens, 50)).astype(np.float32)
    with using("scalar"):
        expected = multiply(matrix, x)
    for isa in ISAS:
        with using(isa):
            assert multiply(matrix, x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(64, 300), (31, 65), (1, 257), (9, 1)])
@pytest.mark.parametrize("bound", [0.02, 0.004, 0.001])
def test_what_four_bits_leave_out_is_bounded_by_the_tables(
    bound: float, shape: tuple[int, int]
) -> None:
    weights = drawn(shape)
    weights.reshape(-1)[::97] *= 4
    data = moebound.encode(weights, bound)
    matrix, in_halves = codes_of(data), codes_of(data, bits=4)
    assert in_halves.weights().tobytes() == matrix.weights().tobytes()
    for cut in range(0, 24, 3):

        def read(at: int, n: int, cut: int = cut) -> bytes:
            return data[at : min(at + n, cut)]

        assert most_outside(read, weights.size) is None
    most = most_outside(lambda at, n: data[at : at + n], weights.size)
    if most is not None:
        outside = len(in_halves.patched) - len(matrix.patched)
        assert 0 <= outside <= most


@pytest.mark.parametrize("n_codes", [1, 60, 64, 65, 128, 129, 256])
def test_tables_of_every_width(n_codes: int) -> None:
    rng = np.random.default_rng(n_codes)
    table = rng.standard_normal(n_codes).astype(ml_dtypes.bfloat16).astype(np.float32)
    first = -(n_codes // 2)
    table[-first] = 0
    none = np.empty(0, np.float32)
    codes = rng.integers(0, n_codes, 40 * 70).astype(np.uint8)
    places = np.array([3, 70, 71], np.uint32)
    codes[places.astype(np.int64)] = -first
    matrix = CodeMatrix(codes, (40, 70), "BF16", table, none, False, first, places,
                        np.array([1, 2, 3], np.float32))  # fmt: skip
    x = rng.standard_normal((2, 70)).astype(np.float32)
    expected = reference(table[codes].reshape(40, 70), x, places, matrix.patch_weights)
    for isa in ISAS:
        with using(isa):
            np.testing.assert_array_equal(multiply(matrix, x), expected)
            np.testing.assert_array_equal(multiply(matrix, x[:1]), expected[:1])
    in_halves = in_bits(matrix, 4)
    assert in_halves.weights().tobytes() == matrix.weights().tobytes()
    outside = np.abs(codes.astype(int) - (n_codes // 2) + 0.5) > 8
    assert len(in_halves.patched) == len(places) + int(outside.sum())


def test_a_fused_multiply_add_is_rounded_once() -> None:
    one, tiny = np.float32(1), np.float32(2**-24)
    # 1 + 2^-24 + 2^-48 is above the middle of two floats; in two steps it would be rounded to even.
    above = fma(tiny, one + np.float32(2**-23), one)
    assert above == one + np.float32(2**-23)
    assert fma(tiny, one, one) == one


def test_what_has_no_codes_is_refused() -> None:
    weights = drawn((64, 64), infinite=False)
    wide = moebound.encode(weights, 1e-5)
    exact = moebound.encode(weights, 1e-12)
    other = moebound.encode(weights, 0.004, codec="lossless")
    vector = moebound.encode(weights.reshape(-1), 0.004)
    for data, what in ((wide, "codes"), (exact, "exact"), (other, "lossless")):
        reason = has_codes(lambda at, n, data=data: data[at : at + n])  # type: ignore[misc]
        assert reason is not None
        assert what in reason
        with pytest.raises((CodecError, CorruptionError)):
            codes_of(data)
    with pytest.raises(CodecError, match="expected a matrix"):
        codes_of(vector)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_say_what_can_be_codes(kind: str) -> None:
    data = encoded(kind, (70, 33))
    assert has_codes(lambda at, n: data[at : at + n]) is None
    many = drawn((64, 300), infinite=False)
    many[:, ::16] = np.nan  # patches as long as many heads
    data = moebound.encode(many, 0.004)
    assert has_codes(lambda at, n: data[at : at + n]) is None
    for cut in range(80):
        assert has_codes(lambda at, n, cut=cut: data[at : min(at + n, cut)]) is not None  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_streams_give_an_error_or_codes(kind: str) -> None:
    parsed = envelope.parse(encoded(kind, (70, 33)))
    payload, n = bytes(parsed.payload), parsed.spec.size
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(150):
        damaged = bytearray(payload)
        for at in rng.integers(0, len(damaged), 2):
            damaged[at] ^= 1 << int(rng.integers(8))
        found: list[Any] = []
        for isa in ISAS:
            out = np.zeros(n, np.uint8)
            with using(isa):
                try:
                    n_codes, *_ = _native.bound_codes(
                        bytes(damaged), out, 0, 0, parsed.spec.abs_bound, 1
                    )
                except _native.Corrupt:
                    found.append(None)
                else:
                    assert out.max() < n_codes
                    found.append(out.tobytes())
        assert len(set(found)) == 1
        outcomes.append(found[0] is None)
    assert any(outcomes)


def test_matrices_that_do_not_fit_are_refused() -> None:
    none, nowhere = np.empty(0, np.float32), np.empty(0, np.uint32)
    codes, table = np.zeros(12, np.uint8), np.zeros(4, np.float32)

    def make(**change: Any) -> Any:
        given: dict[str, Any] = {"codes": codes, "shape": (3, 4), "table": table, "steps": none,
                 "patched": nowhere, "patch_weights": none, "first": 0} | change  # fmt: skip
        return CodeMatrix(dtype="BF16", by_row=False, **given)

    for change in (
        {"shape": (4, 4)}, {"shape": (0, 4)}, {"steps": none, "table": none},
        {"table": np.zeros(257, np.float32)}, {"factors": np.ones(3, np.float32)},
        {"factors": np.ones(4, np.float32), "table": none, "steps": np.ones(4, np.float32)},
        {"patched": np.array([12], np.uint32), "patch_weights": np.array([1], np.float32)},
        {"patched": np.array([3, 3], np.uint32), "patch_weights": np.array([1, 1], np.float32)},
        {"patch_weights": np.array([1], np.float32)}, {"bits": 5}, {"codes": codes, "bits": 4},
        {"table": np.zeros(17, np.float32), "codes": codes[:6], "bits": 4},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(change)).replace("shape", "codes")):
            make(**change)
    matrix = make()
    x, out = np.zeros(8, np.float32), np.zeros(6, np.float32)
    matrix.product(x, out, stride=3)
    for bad in ({"x": x[:7]}, {"out": out[:5]}, {"stride": 2}, {"out": out.view(np.int32)}):
        with pytest.raises((ValueError, TypeError)):
            matrix.product(**{"x": x, "out": out, "stride": 3} | bad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same(kind: str) -> None:
    matrix = patched(codes_of(encoded(kind, (70, 33))))
    copied = matrix.copy(matrix.codes.copy())
    assert copied.weights().tobytes() == matrix.weights().tobytes()
    assert copied.aside_bytes == matrix.aside_bytes
    assert len(matrix.factors) == (70 if "factors" in kind else 0)
    assert matrix.aside_bytes >= matrix.factors.nbytes + matrix.steps.nbytes


@pytest.mark.parametrize("kind", ["rows", "columns, factors"])
def test_many_products_at_once_are_each_by_itself(kind: str) -> None:
    first, second = (patched(codes_of(encoded(some, (70, 33)))) for some in ("grid", kind))
    x = np.random.default_rng(0).standard_normal((5, 33)).astype(np.float32)
    alone = multiply(first, x), multiply(second, x[2:3]), multiply(first, x[4:])
    jobs = [Product(first, 0, 5, 0, 70), Product(second, 2 * 33, 1, 350, 70),
            Product(second, 0, 0, 0, 70), Product(first, 4 * 33, 1, 425, 75)]  # fmt: skip
    for isa in ISAS:
        for threads in (1, 3):
            out = np.full(500, 7, np.float32)
            with using(isa):
                products(jobs, x.reshape(-1), out, threads=threads)
            assert out[:350].tobytes() == alone[0].tobytes()
            assert out[350:420].tobytes() == alone[1].tobytes()
            assert out[425:495].tobytes() == alone[2].tobytes()
            assert (out[420:425] == 7).all()
            assert (out[495:] == 7).all()


def test_products_out_of_bounds_are_refused() -> None:
    matrix = codes_of(encoded("grid", (70, 33)))
    x, out = np.zeros(66, np.float32), np.zeros(150, np.float32)
    products([Product(matrix, 33, 1, 80, 70)], x, out)
    products([Product(matrix, 0, 2, 0, 80)], x, out)
    for bad in (
        (34, 1, 0, 70), (0, 3, 0, 70), (0, 1, 81, 70), (0, 2, 0, 81), (0, 2, 0, 69),
        (2**63, 1, 0, 70), (0, 1, 2**63, 70),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"x|out"):
            products([Product(matrix, *bad)], x, out)
    with pytest.raises(TypeError):
        _native.products([(None, 0, 1, 0, 70)], x, out, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(70, 96), (61, 50), (130, 33)])
def test_plain_weights_are_summed_in_the_same_order(shape: tuple[int, int], isa: str) -> None:
    rng = np.random.default_rng(1)
    bf16 = ml_dtypes.bfloat16
    weights = rng.standard_normal(shape).astype(bf16)
    bias = rng.standard_normal(shape[0]).astype(bf16)
    x = rng.standard_normal((9, shape[1])).astype(bf16)
    none, nothing = np.empty(0, np.uint32), np.empty(0, np.float32)
    sums = reference(weights.astype(np.float32), x.astype(np.float32), none, nothing)
    for given, expected in ((bias, sums + bias.astype(np.float32)), (np.empty(0, bf16), sums)):
        for n, threads in ((9, 2), (1, 1), (3, 3)):
            for dtype in (bf16, np.dtype(np.float32)):
                rows = x[:n].astype(dtype).reshape(-1)
                out = np.zeros(n * shape[0], dtype)
                bits = np.uint16 if dtype == bf16 else dtype
                with using(isa):
                    _native.linear(
                        flat(weights), flat(given), rows.view(bits), out.view(bits), shape[1],
                        threads,
                    )  # fmt: skip
                assert out.tobytes() == expected[:n].astype(dtype).tobytes()


def test_plain_weights_that_do_not_fit_are_refused() -> None:
    given: dict[str, Any] = {
        "weights": np.zeros(12, np.uint16), "bias": np.zeros(3, np.uint16),
        "x": np.zeros(8, np.uint16), "out": np.zeros(6, np.uint16), "columns": 4, "threads": 1,
    }  # fmt: skip
    _native.linear(**given)
    for name, bad in (("weights", 11), ("weights", 0), ("bias", 2), ("x", 7), ("out", 7)):
        with pytest.raises(ValueError, match=name):
            _native.linear(**given | {name: np.zeros(bad, np.uint16)})
    with pytest.raises(ValueError, match="out"):
        _native.linear(**given | {"out": np.zeros(6, np.float32)})
