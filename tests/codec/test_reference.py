"""The readable codec and the quick one: the same grid, the same bytes, the same values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound import _native, encode
from moebound.codec import envelope
from moebound.codec.arrays import dtype_name
from moebound.codec.bound import DTYPE_CODES
from moebound.codec.reference import bits as reference_bits
from moebound.codec.reference import decode as reference_decode
from moebound.codec.reference import decode_lossless, encode_lossless
from moebound.codec.reference import encode as reference_encode
from moebound.codec.reference.formats import FORMATS
from moebound.codec.reference.layout import Layout, read_layout, write_layout
from moebound.codec.reference.rans import write_segment
from moebound.codec.reference.tables import normalize
from moebound.errors import CorruptionError
from moebound.types import NUMPY_DTYPES, Array, DType

from .kernel import ISAS, SEGMENT_WEIGHTS, kernel_decode, kernel_encode, using
from .weights import DTYPES, arrays, bits, every_pattern, gaussian

EXAMPLES = settings(max_examples=120)


# --- the same bytes and the same values ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One array and how to encode it."""

    name: str
    array: Callable[[], Array]
    bound: float
    dtype: DType | None = None
    columns: int | None = None
    segment_weights: int = SEGMENT_WEIGHTS


def scaled(
    shape: tuple[int, int], dtype: DType = "BF16", *, by: str = "rc", spread: float = 0.7
) -> Array:
    """Gaussian weights whose rows (r) and columns (c) have scales of their own."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal(shape) * 0.02
    if "r" in by:
        values *= np.exp(spread * rng.standard_normal((shape[0], 1)))
    if "c" in by:
        values *= np.exp(spread * rng.standard_normal((1, shape[1])))
    return values.astype(NUMPY_DTYPES[dtype])


def odd(shape: tuple[int, ...], dtype: DType, *, seed: int = 6) -> Array:
    """Weights with what is no weight: zeros of both signs, NaN, infinities, denormals, giants."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 0.1
    for value in (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -6e-8, 65504.0, -3.3e38):
        values[rng.random(shape) < 0.01] = value
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(NUMPY_DTYPES[dtype])


def _constant(value: float, shape: tuple[int, ...], dtype: DType = "BF16") -> Array:
    return np.full(shape, value, NUMPY_DTYPES[dtype])


CASES = [
    Case("one", lambda: gaussian((1,)), 0.001),
    Case("one zero", lambda: _constant(0.0, (1, 1)), 0.001),
    Case("one NaN", lambda: _constant(np.nan, (1,)), 0.001),
    Case("seven, in columns of 3", lambda: gaussian((7,)), 0.001, columns=3),
    Case("31 columns", lambda: gaussian((40, 31)), 0.003),
    Case(
        "33 columns, segments of 5 rows", lambda: gaussian((40, 33), "F16"), 0.003, None, None, 165
    ),
    Case("a short last row", lambda: gaussian((1003,)), 0.002, columns=100),
    Case("more columns than weights", lambda: gaussian((20,)), 0.002, columns=64),
    Case("more columns, all zero", lambda: _constant(0.0, (20,)), 0.002, columns=64),
    Case("rows longer than a segment", lambda: gaussian((9, 400)), 0.01, segment_weights=100),
    Case("3-D", lambda: gaussian((3, 17, 64)), 0.004),
    Case("low bits", lambda: gaussian((64, 64), "F16", scale=1.0), 2e-4),
    Case("low bits in short groups", lambda: gaussian((50, 45), "F32"), 1e-5, None, None, 500),
    Case("8 low bits", lambda: gaussian((16, 32), "F32", scale=1.0), 1e-4),
    Case("every cell", lambda: gaussian((8, 40), "F32", scale=1.0), 1e-7),
    Case("constants", lambda: _constant(-0.3, (100, 100), "F16"), 0.001),
    Case("zeros", lambda: _constant(0.0, (100, 100)), 0.001),
    Case("NaN", lambda: _constant(np.nan, (100, 10)), 0.001),
    Case("one value in 9000", lambda: np.eye(1, 9000, 77, dtype=np.float32), 0.01),
    Case(
        "positive",
        lambda: np.abs(gaussian((60, 60), scale=1.0)) + NUMPY_DTYPES["BF16"].type(9),
        0.05,
    ),
    Case("odd bf16", lambda: odd((60, 70), "BF16"), 0.01),
    Case("odd fp16", lambda: odd((60, 70), "F16"), 0.003),
    Case("odd fp32", lambda: odd((60, 70), "F32"), 1.0),
    Case("a tiny bound", lambda: odd((30, 32), "BF16"), 1e-40),
    Case("a huge bound", lambda: odd((30, 32), "BF16"), 1e39),
    Case("every bf16", lambda: every_pattern("BF16")[::5], 3.0),
    Case("every fp16", lambda: every_pattern("F16")[::7], 0.01),
    Case("rows", lambda: scaled((120, 120), by="r"), 0.006),
    Case("columns", lambda: scaled((90, 130), "F16", by="c"), 0.006),
    Case("rows and columns", lambda: scaled((130, 129)), 0.004, segment_weights=3000),
    Case("rows and columns, low bits", lambda: scaled((120, 100), "F32"), 5e-5),
    Case("a few tables", lambda: scaled((150, 200), by="r", spread=0.3), 0.002),
    Case("coarse", lambda: scaled((150, 100)), 0.05),
    Case("fp32 to bf16", lambda: scaled((80, 64), "F32"), 0.002, "BF16"),
    Case("fp32 to fp16", lambda: odd((80, 64), "F32"), 0.002, "F16"),
    Case("bf16 to fp16", lambda: odd((80, 64), "BF16"), 0.002, "F16"),
    Case("fp16 to fp32", lambda: gaussian((80, 64), "F16"), 0.002, "F32"),
    Case("4 lanes", lambda: gaussian((100, 99)), 0.01),
    Case("32 lanes", lambda: gaussian((257, 128)), 0.005, segment_weights=10_000),
    Case("32 lanes, tables, low bits", lambda: scaled((300, 111), "F16"), 2e-4),
    Case("6 mantissa bits, sampled rows", lambda: scaled((525, 250)), 0.01),
]


def _encode_both(case: Case) -> tuple[Array, bytes]:
    """The case's array and payload, on which the reference and the kernel agree."""
    array = case.array()
    columns = case.columns or array.shape[-1]
    payload, misses = kernel_encode(
        array,
        case.bound,
        dtype=case.dtype,
        columns=columns,
        segment_weights=case.segment_weights,
    )
    source = dtype_name(array.dtype)
    ours, our_misses = reference_encode(
        bits(array),
        source=source,
        output=case.dtype or source,
        bound=case.bound,
        columns=columns,
        segment_weights=case.segment_weights,
    )
    assert our_misses.tolist() == misses.tolist()
    assert ours == payload
    return array, payload


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bytes_and_values(case: Case) -> None:
    array, payload = _encode_both(case)
    source = dtype_name(array.dtype)
    output = case.dtype or source
    ours = reference_decode(payload, array.size, source=source, output=output, bound=case.bound)
    for isa in ISAS:
        with using(isa):
            theirs = kernel_decode(payload, array.size, case.bound, dtype=output, source=source)
        np.testing.assert_array_equal(ours, theirs)


def test_cases_reach_every_part() -> None:
    """Whoever changes an encoder's choice shall see if a case no longer tests what it is for."""
    seen: dict[str, set[int]] = {}
    for case in CASES:
        array = case.array()
        data, misses = kernel_encode(
            array,
            case.bound,
            dtype=case.dtype,
            columns=case.columns,
            segment_weights=case.segment_weights,
        )
        layout = read_layout(reference_bits.ByteReader(data), array.size)
        found = {
            "T": layout.table_log,
            "lanes": layout.lanes,
            "low bits": layout.low_bits,
            "mantissa": layout.mantissa_bits,
            "segments": min(2, len(layout.segment_words)),
            "tables": layout.n_tables,
            "misses": min(1, len(misses)),
        }
        for what, value in found.items():
            seen.setdefault(what, set()).add(value)
    assert seen["T"] == {10, 11, 12}
    assert seen["lanes"] == {1, 4, 32}
    assert {0, 1, 8} < seen["low bits"]
    assert seen["mantissa"] == {3, 6}
    assert seen["segments"] == {1, 2}
    assert seen["misses"] == {0, 1}
    assert {1, 16} < seen["tables"]  # and others between


@EXAMPLES
@given(array=arrays(), exponent=st.floats(-4, 1), columns=st.integers(1, 50), data=st.data())
def test_same_on_anything(array: Array, exponent: float, columns: int, data: st.DataObject) -> None:
    if array.size:
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.abs(array.astype(np.float64)[np.isfinite(array.astype(np.float64))])
        bound = float(finite.max(initial=0.0)) * 10.0**exponent or 1.0
        output = data.draw(st.sampled_from(DTYPES))
        case = Case("", lambda: array, bound, output, columns, data.draw(st.integers(1, 300)))
        _, payload = _encode_both(case)
        source = dtype_name(array.dtype)
        ours = reference_decode(payload, array.size, source=source, output=output, bound=bound)
        theirs = kernel_decode(payload, array.size, bound, dtype=output, source=source)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (100, 130), (258, 128)])
def test_lossless_is_the_same(dtype: DType, shape: tuple[int, ...]) -> None:
    array = scaled(shape, dtype) if len(shape) == 2 else gaussian(shape, dtype)
    encoded = encode(array, 1.0, codec="lossless")
    payload = bytes(envelope.parse(encoded).payload)
    columns = array.shape[-1] if array.shape[-1] >= 32 else array.size
    assert encode_lossless(bits(array), dtype=dtype, columns=columns) == payload
    np.testing.assert_array_equal(decode_lossless(payload, array.size, dtype=dtype), bits(array))


# --- what the format allows and the encoder does not do -----------------------------------------


@st.composite
def any_payload(draw: st.DrawFn) -> tuple[bytes, int, float, DType, list[int]]:
    """A payload of free choices: its bytes, n, ε, dtype and the bins in it."""
    table_log, low_bits = draw(st.integers(1, 12)), draw(st.integers(0, 8))
    n_symbols = draw(st.integers(1, 256 if low_bits < 4 else 40))
    n_tables = draw(st.sampled_from([1, 1, 2, 5, 16]))
    columns = draw(st.integers(1, 100))
    n = draw(st.integers(1, 400))
    layout = Layout(
        table_log=table_log,
        lanes_log=draw(st.sampled_from([0, 1, 2, 3, 4, 5, 5, 5])),
        low_bits=low_bits,
        n_tables=n_tables,
        mantissa_bits=draw(st.integers(0, 12)),
        columns=columns,
        rows_per_segment=draw(st.integers(1, 20)),
        symbol_low=draw(st.integers(-40, 20)),
        n_symbols=n_symbols,
        class_base=draw(st.integers(0, 70)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    n_rows = layout.n_rows(n)
    layout.row_classes = rng.integers(0, 1 << draw(st.integers(0, 6)), n_rows).tolist()
    layout.column_classes = rng.integers(0, 1 << draw(st.integers(0, 6)), columns).tolist()
    for _ in range(n_tables):
        counts = rng.geometric(0.01, n_symbols)
        present = int(rng.integers(1, min(n_symbols, 1 << table_log) + 1))
        counts[rng.permutation(n_symbols)[present:]] = 0
        frequencies, rest = normalize(counts.tolist(), table_log, layout.mantissa_bits)
        layout.tables.append(frequencies)
        layout.rests.append(rest)
    bins: list[int] = []
    segments = b""
    for rows in layout.segments(n):
        symbols, lows = [], []
        for row in rows:
            length = layout.row_length(row, n)
            tables = layout.tables_of_row(row)[:length]
            of_row = [int(rng.choice(np.flatnonzero(layout.tables[t]))) for t in tables]
            symbols.append(of_row)
            lows.append(rng.integers(0, 1 << low_bits, length).tolist())
            bins += [
                (layout.symbol_low + s << low_bits) + low
                for s, low in zip(of_row, lows[-1], strict=True)
            ]
        data, n_words = write_segment(symbols, lows, layout, rows)
        layout.segment_words.append(n_words)
        segments += data
    dtype = draw(st.sampled_from(DTYPES))
    bound = draw(st.sampled_from([1e-3, 0.01, 0.5]))
    return write_layout(layout) + segments, n, bound, dtype, bins


@settings(EXAMPLES, max_examples=80)
@given(any_payload())
def test_every_choice_the_format_leaves(case: tuple[bytes, int, float, DType, list[int]]) -> None:
    payload, n, bound, dtype, bins = case
    ours = reference_decode(payload, n, source=dtype, output=dtype, bound=bound)
    code, furthest = DTYPE_CODES[dtype], max(abs(b) for b in bins)
    values = _native.grid(code, code, bound, furthest + 1)[0].astype(np.int64)
    expected = values[np.minimum(np.abs(bins), len(values) - 1)]
    expected += FORMATS[dtype].sign * (np.array(bins) < 0)
    np.testing.assert_array_equal(ours, expected)
    for isa in ISAS:
        with using(isa):
            np.testing.assert_array_equal(kernel_decode(payload, n, bound, dtype=dtype), ours)


@EXAMPLES
@given(case=any_payload(), data=st.data())
def test_same_verdict_on_damage(
    case: tuple[bytes, int, float, DType, list[int]], data: st.DataObject
) -> None:
    """The reference and every path of the kernel accept the same bytes, as the same values."""
    payload, n, bound, _, _ = case
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 2))):
        # Early bytes are the header: hit it as often as the rest.
        end = data.draw(st.sampled_from([12, 40, len(damaged)]))
        at = data.draw(st.integers(0, min(end, len(damaged)) - 1))
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        ours = reference_decode(bytes(damaged), n, source="BF16", output="BF16", bound=bound)
    except CorruptionError:
        ours = None
    if damaged[0] == 0:
        return  # an exact copy: codec `bound` sees that before the kernel does
    for isa in ISAS:
        with using(isa):
            if ours is None:
                with pytest.raises(_native.Corrupt):
                    kernel_decode(bytes(damaged), n, bound, dtype="BF16")
            else:
                theirs = kernel_decode(bytes(damaged), n, bound, dtype="BF16")
                np.testing.assert_array_equal(theirs, ours)
