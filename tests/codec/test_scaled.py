"""Codec `bound`, version 2: whole numbers times steps, on every path alike, within their bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound import _native, decode, encode
from moebound.codec import Steps, encode_codes, envelope
from moebound.codec.bound import SCALED
from moebound.codec.reference import decode as reference_decode
from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.layout import Layout, Scaling, read_layout, write_layout
from moebound.codec.reference.rans import write_segment
from moebound.codec.reference.steps import step_sizes, stretched_table
from moebound.errors import CodecError, CorruptionError
from moebound.types import DType, ErrorBound
from stepped_bounds import bounds_by_step

from . import weights
from .kernel import ISAS, kernel_decode, using
from .stepped import Stepped, drawn_levels, half, odd
from .weights import DTYPES, bits


def made(
    rows: int, cols: int, dtype: DType = "BF16", *, bound: float = 0.01, spread: int = 9,
    kappa: float = 2.0, by_row: bool = False, seed: int = 0, oddities: bool = False,
    factors: int | None = None,
) -> Stepped:  # fmt: skip
    """factors: how far those of the other side are spread; None for none."""
    array = weights.gaussian((rows, cols), dtype, seed=seed)
    levels = drawn_levels(rows if by_row else cols, spread, seed)
    others = None if factors is None else drawn_levels(cols if by_row else rows, factors, seed + 1)
    return Stepped.of(odd(array) if oddities else array, levels, bound, kappa=kappa, by_row=by_row,
                      factors=others)  # fmt: skip


# --- the same values, within the bounds -----------------------------------------------------------


@settings(max_examples=150)
@given(
    rows=st.integers(1, 90), cols=st.integers(1, 150), dtype=st.sampled_from(DTYPES),
    log_bound=st.floats(-22, 3), spread=st.integers(0, 40), by_row=st.booleans(),
    kappa=st.sampled_from([1.0, 1.5, 2.0, 16.0]), seed=st.integers(0, 1 << 20),
    oddities=st.booleans(), segment_weights=st.sampled_from([64, 1000, 1 << 18]),
    factors=st.none() | st.integers(0, 40),
)  # fmt: skip
def test_every_path_gives_the_products(
    rows: int, cols: int, dtype: DType, log_bound: float, spread: int, by_row: bool, kappa: float,
    seed: int, oddities: bool, segment_weights: int, factors: int | None,
) -> None:  # fmt: skip
    of = made(rows, cols, dtype, bound=2.0**log_bound, spread=spread, kappa=kappa, by_row=by_row,
              seed=seed, oddities=oddities, factors=factors)  # fmt: skip
    payload, misses = of.payload(segment_weights=segment_weights)
    found = []
    for isa in ISAS:
        with using(isa):
            assert of.payload(segment_weights=segment_weights, threads=2)[0] == payload
            found.append(kernel_decode(payload, rows * cols, of.bound, dtype=dtype))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    coded = np.ones(rows * cols, bool)
    coded[misses.astype(np.intp)] = False
    np.testing.assert_array_equal(found[0][coded], bits(of.products())[coded])
    with np.errstate(invalid="ignore"):
        error = np.abs(of.weights.astype(np.float64) - of.products().astype(np.float64))
        assert (error <= of.bounds).reshape(-1)[coded].all()
    assert of.bounds.max() <= of.bound


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40), cols=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    log_bound=st.floats(-14, 2), spread=st.integers(0, 40), by_row=st.booleans(),
    seed=st.integers(0, 1 << 20), factors=st.none() | st.integers(0, 40),
)  # fmt: skip
def test_the_reference_gives_the_same(
    rows: int, cols: int, dtype: DType, log_bound: float, spread: int, by_row: bool, seed: int,
    factors: int | None,
) -> None:  # fmt: skip
    of = made(rows, cols, dtype, bound=2.0**log_bound, spread=spread, by_row=by_row, seed=seed,
              oddities=True, factors=factors)  # fmt: skip
    payload, _ = of.payload(segment_weights=500)
    ours = reference_decode(payload, rows * cols, source=dtype, output=dtype, bound=of.bound)
    np.testing.assert_array_equal(kernel_decode(payload, rows * cols, of.bound, dtype=dtype), ours)
    layout = read_layout(ByteReader(payload), rows * cols)
    assert payload.startswith(write_layout(layout))


def test_cases_reach_every_part() -> None:
    """Whoever changes the encoder's choices shall see what is no longer tested."""
    rng = np.random.default_rng(5)
    large = weights.gaussian((600, 450), "F32") * np.exp(rng.standard_normal((600, 1)))
    cases = [
        made(40, 64), made(60, 40, by_row=True), made(12, 20, spread=0), made(260, 128, spread=0),
        made(300, 200), made(400, 700, spread=20), made(50, 33, "F16", bound=4e-5),
        made(600, 450, by_row=True), made(6, 90, spread=0, bound=0.3), made(60, 90, factors=9),
        made(500, 300, factors=20), made(300, 500, by_row=True, factors=9),
        Stepped.of(large.astype(np.float32), np.zeros(450), 0.02),
    ]  # fmt: skip
    seen: dict[str, set[object]] = {}
    for case in cases:
        layout = read_layout(ByteReader(case.payload()[0]), case.weights.size)
        assert layout.scaling is not None
        found = {
            "lanes": layout.lanes, "low bits": layout.low_bits > 0,
            "tables": min(2, layout.n_tables), "stretched": layout.scaling.stretch is not None,
            "by level": layout.scaling.classes_by_level, "by row": layout.scaling.by_row,
            "several segments": len(layout.segment_words) > 1,
            "alike": len(set(layout.scaling.levels)) == 1,
            "factors": layout.scaling.factors is not None,
            "stored, by level": layout.scaling.classes_by_level and layout.scaling.stretch is None,
        }  # fmt: skip
        for what, value in found.items():
            seen.setdefault(what, set()).add(value)
    assert seen.pop("lanes") == {1, 32}
    assert seen.pop("tables") == {1, 2}
    assert all(values == {False, True} for values in seen.values()), seen


def test_steps_of_levels() -> None:
    """Four levels are a factor of 2, and the widest step has the bound."""
    levels = np.arange(256, dtype=np.uint8)
    sizes = Steps(levels, 2.0).sizes(0.1)
    assert sizes.dtype == np.float32
    assert float(sizes[0]) <= 0.1 < float(np.nextafter(sizes[0], np.float32(1)))
    np.testing.assert_array_equal(sizes[4:], sizes[:-4] / 2)
    np.testing.assert_allclose(sizes[:-1] / sizes[1:], 2**0.25, rtol=1e-6)
    np.testing.assert_array_equal(sizes, step_sizes(levels.tolist(), 2.0, 0.1))


@given(bound=st.floats(1e-30, 1e300), kappa=st.sampled_from([1.0, 1.5, 1.7001953125, 16.0]))
def test_the_widest_step_never_leaves_the_bound(bound: float, kappa: float) -> None:
    (size,) = Steps(np.zeros(1, np.uint8), kappa).sizes(bound)
    assert float(size) * kappa / 2 <= bound
    assert [size] == step_sizes([0], kappa, bound).tolist()


@given(
    stretch=st.integers(0, 300), symbol_low=st.integers(-(2**15), 2**15),
    low_bits=st.integers(0, 8), n_symbols=st.integers(1, 256), table_log=st.integers(8, 12),
)  # fmt: skip
def test_stretched_tables_are_tables(
    stretch: int, symbol_low: int, low_bits: int, n_symbols: int, table_log: int
) -> None:
    table = stretched_table(stretch, symbol_low, n_symbols, low_bits, table_log)
    assert len(table) == n_symbols
    assert min(table) >= 1
    assert sum(table) == 1 << table_log


def test_a_stretched_table_is_a_gaussian() -> None:
    from math import erf

    table = stretched_table(32 + 8 * 3, -40, 81, 0, 12)  # of 8 bins standard deviation
    for q in (-20, -3, 0, 1, 12):
        exact = (erf((q + 0.5) / 8 / 2**0.5) - erf((q - 0.5) / 8 / 2**0.5)) / 2
        assert table[q + 40] == pytest.approx(exact * (4096 - 81) + 1, abs=2)


# --- envelopes ------------------------------------------------------------------------------------


def test_an_envelope_says_how_far_each_weight_may_be_off() -> None:
    for by_row in (False, True):
        of = made(30, 50, by_row=by_row, oddities=True)
        data = of.envelope()
        parsed = envelope.parse(data)
        assert (parsed.codec, parsed.codec_version) == ("bound", 2)
        found = bounds_by_step(parsed)
        assert found is not None
        np.testing.assert_array_equal(np.broadcast_to(found, (30, 50)), of.bounds)
        decoded = decode(data)
        assert isinstance(decoded, np.ndarray)
        finite = np.isfinite(of.weights.astype(np.float32))
        original, found_there = of.weights[finite], decoded[finite]
        error = np.abs(original.astype(np.float64) - found_there.astype(np.float64))
        assert (error <= of.bounds[finite]).all()
        np.testing.assert_array_equal(bits(decoded[~finite]), bits(of.weights[~finite]))
    assert bounds_by_step(envelope.parse(encode(of.weights, 0.01))) is None


def test_codes_far_from_their_weights_are_patched() -> None:
    of = made(20, 40)
    wrong = of.codes.copy()
    wrong[3, 4] += 2
    wrong[5, 6] = 1 << 30
    encoded = encode_codes(of.weights, wrong, of.steps, ErrorBound(of.bound), of.bound)
    assert encoded.certificate.patched == 2
    assert encoded.certificate.kept
    assert encoded.decoded[3, 4] == of.weights[3, 4]


def test_an_exact_copy_where_that_is_smaller() -> None:
    of = made(64, 64, bound=1e-9)
    data = of.envelope()
    parsed = envelope.parse(data)
    assert (parsed.codec_version, parsed.payload[0]) == (1, 0)
    np.testing.assert_array_equal(bits(np.asarray(decode(data))), bits(of.weights))


def test_what_does_not_fit_is_refused() -> None:
    of = made(20, 40)
    for codes, steps in (
        (of.codes[:-1], of.steps),
        (of.codes, replace(of.steps, by_row=True)),
        (of.codes, replace(of.steps, levels=of.steps.levels[:-1])),
    ):
        with pytest.raises(CodecError, match="expected the same shape, and one level for each"):
            encode_codes(of.weights, codes, steps, ErrorBound(of.bound), of.bound)
    for kappa in (0.5, 17.0, 1.3, float("nan")):
        with pytest.raises(CodecError, match="expected 1 to 16"):
            Steps(of.steps.levels, kappa)
    for bound in (1e-40, 5e-324):
        with pytest.raises(CodecError, match="below the normal float32"):
            encode_codes(of.weights, of.codes, of.steps, ErrorBound(bound), bound)


# --- hostile bytes --------------------------------------------------------------------------------


def _payload(
    levels: list[int], kappa: int = half(2.0), *, symbol_low: int = -1, low_bits: int = 0,
    by_row: bool = False, table_log: int = 4, n_symbols: int = 3, stretch: int | None = 30,
    factors: list[int] | None = None,
) -> bytes:  # fmt: skip
    """Zeros, one in each column or row of a vector."""
    columns = 1 if by_row else len(levels)
    layout = Layout(
        table_log=table_log, lanes_log=0, low_bits=low_bits, columns=columns, rows_per_segment=1,
        symbol_low=symbol_low, n_symbols=n_symbols, rests=[0],
        tables=[stretched_table(30, symbol_low, n_symbols, low_bits, table_log)],
        scaling=Scaling(by_row=by_row, kappa=kappa, levels=levels, stretch=stretch,
                        factors=factors),
    )  # fmt: skip
    rows = range(len(levels) if by_row else 1)
    segments = b""
    for row in rows:
        data, n_words = write_segment([[1] * columns], [[0] * columns], layout, range(row, row + 1))
        segments += data
        layout.segment_words.append(n_words)
    return write_layout(layout) + segments


def _refused(payload: bytes, n: int, bound: float, match: str) -> None:
    for isa in ISAS:
        with using(isa), pytest.raises(_native.Corrupt, match=match):
            kernel_decode(payload, n, bound, dtype="BF16")
    with pytest.raises(CorruptionError):
        reference_decode(payload, n, source="BF16", output="BF16", bound=bound)


def test_what_no_encoder_writes() -> None:
    assert (kernel_decode(_payload([0, 5, 255]), 3, 0.1, dtype="BF16") == 0).all()
    assert (kernel_decode(_payload([0, 5, 9], by_row=True), 3, 0.1, dtype="F32") == 0).all()
    for kappa in (half(0.5), half(17), half(np.nan), half(-2), half(np.inf), 0):
        _refused(_payload([0, 5, 9], kappa), 3, 0.1, "expected 1 to 16")
    for bound in (1e-38, 5e-324):
        _refused(_payload([0, 5, 255]), 3, bound, "below the normal float32")
        _refused(_payload([0, 5, 9], factors=[250]), 3, bound, "below the normal float32")
    assert (kernel_decode(_payload([0, 5, 9], factors=[250]), 3, 0.1, dtype="F16") == 0).all()
    _refused(_payload([0, 5, 9], symbol_low=1 << 16), 3, 0.1, "beyond the largest grid")
    whole = bytearray(_payload([0, 5, 9]))
    for flags in (16, 64, 127):
        _refused(bytes([SCALED + flags]) + bytes(whole[1:]), 3, 0.1, "flags are not known")
    assert whole[3:5] == bytes([4, 0])
    at = 9  # behind columns, rows of a segment, symbol_low and symbols
    assert whole[at - 1] == 3
    _refused(bytes(whole[:at]) + bytes([8]) + bytes(whole[at + 1 :]), 3, 0.1, "levels are out of")
    low = bytes(whole[:at]) + bytes([whole[at], 0]) + b"\xff\x01" + bytes(whole[at + 2 :])
    _refused(low, 3, 0.1, "level|unary|ends early|last segment|bits end")
    many = _payload([0] * 20, table_log=4, n_symbols=3)
    more = bytes(many[:8]) + b"\x11" + bytes(many[9:])  # 17 symbols, in tables of 16 slots
    _refused(more, 20, 0.1, "more symbols than")


def test_products_beyond_the_dtype_are_infinite_on_every_path() -> None:
    payload = _payload([0, 0, 0], n_symbols=3, symbol_low=30_000)
    for dtype, infinity in (("BF16", 0x7F80), ("F16", 0x7C00), ("F32", 0x7F800000)):
        for isa in ISAS:
            with using(isa):
                found = kernel_decode(payload, 3, 3e38, dtype=dtype)  # type: ignore[arg-type]
            assert (found == infinity).all()


def test_many_levels_in_few_bytes_take_no_memory_for_them() -> None:
    payload = _payload([0, 1, 0])
    assert payload[5] == 3  # columns
    wide = payload[:5] + b"\xff\xff\x03" + payload[6:]
    with pytest.raises(_native.Corrupt):
        kernel_decode(wide, 65535, 0.1, dtype="BF16")
