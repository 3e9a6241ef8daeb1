"""cuSZp's stream: the examples worked by hand, the reference, foreign and damaged bytes."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound import decode, encode
from moebound.codec import parse, rounding
from moebound.codec.base import ArraySpec
from moebound.codec.cuszp import (
    BLOCK,
    CHUNK,
    MODES,
    CuszpCodec,
    decode_stream,
    encode_stream,
    table_n_bytes,
)
from moebound.codec.reference import cuszp as reference
from moebound.errors import BoundError, CodecError, CorruptionError
from moebound.types import Array

from .kernel import ISAS, using
from .make_fixtures import CASES, Case
from .weights import DTYPES, bits, broken, gaussian

PAGE = (Path(__file__).parents[2] / "docs" / "format-cuszp.md").read_text(encoding="utf-8")
EXAMPLES = [
    dict(line.split(maxsplit=1) for line in found.strip().splitlines())
    for found in re.findall(r"```example\n(.*?)```", PAGE, re.DOTALL)
]

every_mode = pytest.mark.parametrize("mode", MODES)
every_isa = pytest.mark.parametrize("isa", ISAS)


def _numbers(text: str) -> Array:
    """`0*31 -1`: thirty-one zeros and -1."""
    found: list[float] = []
    for word in text.split():
        value, _, times = word.partition("*")
        found += [float(value)] * int(times or 1)
    return np.array(found, np.float32)


def _stream(example: dict[str, str]) -> bytes:
    return bytes.fromhex(example["table"]).ljust(1024, b"\0") + bytes.fromhex(example["blocks"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e['mode']} {e['values']}")
class TestWorkedByHand:
    def test_kernel(self, example: dict[str, str]) -> None:
        x, bound, mode = _numbers(example["values"]), float(example["bound"]), example["mode"]
        decoded = _numbers(example.get("decoded", example["values"]))
        for isa in ISAS:
            with using(isa):
                assert encode_stream(x, bound, mode=mode) == _stream(example)
                found = decode_stream(_stream(example), x.size, bound, mode=mode)
                assert np.array_equal(found, decoded)

    def test_reference(self, example: dict[str, str]) -> None:
        x, bound, mode = _numbers(example["values"]), float(example["bound"]), example["mode"]
        decoded = _numbers(example.get("decoded", example["values"]))
        assert reference.encode_stream(x, bound, mode) == _stream(example)
        found = reference.decode_stream(_stream(example), x.size, bound, mode)
        assert np.array_equal(found, decoded)


def test_the_page_has_an_example_of_every_mode() -> None:
    assert {example["mode"] for example in EXAMPLES} == set(MODES)
    assert len(EXAMPLES) == PAGE.count("```example")


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Array, float, str]:
    """float32 weights, walks or any bits; a bound; a mode."""
    n = draw(st.sampled_from([0, 1, 31, 32, 33, 500, CHUNK - 1, CHUNK, CHUNK + 1]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    kind = draw(st.sampled_from(["noise", "walk", "sparse", "bits"]))
    x = rng.standard_normal(n) * 0.02
    if kind == "walk":
        x = np.cumsum(x) + draw(st.sampled_from([0.0, 1e3, -1e6]))
    if kind == "sparse":
        x[rng.random(n) < 0.9] = 0
        x[rng.random(n) < 0.01] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -1e10]))
    values = x.astype(np.float32)
    if kind == "bits":
        values = rng.integers(0, 1 << 32, n, np.uint32).view(np.float32)
    exponent = draw(st.one_of(st.floats(-8, 2), st.floats(-37, 37)))
    return values, float(np.float32(10.0**exponent)), draw(st.sampled_from(MODES))


@every_isa
@pytest.mark.slow
def test_kernel_and_reference_have_the_same_bytes_and_bits(isa: str) -> None:
    @settings(max_examples=120)
    @given(case=_cases())
    def check(case: tuple[Array, float, str]) -> None:
        x, bound, mode = case
        with using(isa):
            stream = encode_stream(x, bound, mode=mode)
            found = decode_stream(stream, x.size, bound, mode=mode)
        assert stream == reference.encode_stream(x, bound, mode)
        expected = reference.decode_stream(stream, x.size, bound, mode)
        assert np.array_equal(bits(found), bits(expected))

    check()


@every_isa
@every_mode
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_values_are_rounded_to_the_nearest(isa: str, mode: str, dtype: type) -> None:
    """In float32 and then by NumPy, or at once: the same patterns, overflow and denormals too."""
    rng = np.random.default_rng(1)
    for scale, bound in ((1.0, 1e-4), (3e-5, 1e-8), (6e4, 5.0), (5e37, 1e36), (1e-38, 1e-37)):
        x = (rng.standard_normal(3000) * scale).astype(np.float32)
        bound = float(np.float32(bound))
        stream = encode_stream(x, bound, mode=mode)
        header = struct.pack("<Bf", MODES.index(mode), bound)
        payload = header + stream[: -(-x.size // BLOCK)] + stream[table_n_bytes(x.size) :]
        spec = ArraySpec(x.shape, "BF16" if dtype is not np.float16 else "F16", "F32", bound)
        out: Array = np.empty(x.size, dtype)
        with using(isa):
            CuszpCodec().decompress(memoryview(payload), spec, out)
        values = decode_stream(stream, x.size, bound, mode=mode)
        with np.errstate(over="ignore"):
            assert np.array_equal(bits(out), bits(values.astype(dtype)))


@every_mode
def test_a_payload_is_mode_bound_and_stream_without_padding(mode: str) -> None:
    """The padding is that of the table, of 63 blocks here."""
    for dtype in DTYPES:
        array = gaussian((40, 50), dtype)
        payload = bytes(parse(encode(array, 0.003, codec=f"cuszp:{mode}")).payload)
        code, bound = struct.unpack_from("<Bf", payload)
        assert code == MODES.index(mode)
        assert 0.0025 < bound <= np.float32(0.003)
        stream = encode_stream(array.astype(np.float32), bound, mode=mode)
        assert payload[5:68] == stream[:63]
        assert not any(stream[63:1024])
        assert payload[68:] == stream[1024:]


@pytest.mark.parametrize("codec", ["cuszp:fixed", "sz3:nopred"])
def test_where_rounding_breaks_the_bound_often_a_smaller_one_is_taken(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = np.exp(0.5 * np.random.default_rng(0).standard_normal((64, 1)))
    array = (gaussian((64, 512), "F32") * scales).astype(ml_dtypes.bfloat16)
    bound = 0.05 * float(np.abs(array.astype(np.float64)).mean())
    data = encode(array, bound, codec=codec)
    monkeypatch.setattr(rounding, "_MAX_STEPS", 0)
    at_asked = encode(array, bound, codec=codec)
    assert len(data) < len(at_asked)
    assert len(parse(data).misses) < len(parse(at_asked).misses)
    assert len(parse(data).payload) >= len(parse(at_asked).payload)
    assert not len(broken(array, np.asarray(decode(data)), bound))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.codec.startswith("cuszp")], ids=lambda case: case.name
)
def test_the_reference_reads_stored_bytes(case: Case) -> None:
    fixture = case.load()
    parsed = parse(fixture.encoded)
    spec, payload = parsed.spec, bytes(parsed.payload[5:])
    mode, bound = struct.unpack_from("<Bf", parsed.payload)
    n_blocks = -(-spec.size // BLOCK)
    stream = payload[:n_blocks].ljust(table_n_bytes(spec.size), b"\0") + payload[n_blocks:]
    values = reference.decode_stream(stream, spec.size, bound, MODES[mode])
    with np.errstate(over="ignore"):
        found = values.astype(spec.numpy_dtype)
    found[parsed.misses.astype(np.intp)] = parsed.values
    assert np.array_equal(bits(found), bits(fixture.decoded))


def test_all_modes_decode_to_the_same_values() -> None:
    x = gaussian((100, 77), "F32")
    found = [decode_stream(encode_stream(x, 0.003, mode=m), x.size, 0.003, mode=m) for m in MODES]
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_differences_help_what_is_smooth_and_cost_what_is_noise() -> None:
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(CHUNK)).astype(np.float32)
    walk = (5 + np.cumsum(0.001 * rng.standard_normal(CHUNK))).astype(np.float32)
    sizes = {
        (name, mode): len(encode_stream(x, 0.001, mode=mode))
        for name, x in (("noise", noise), ("walk", walk))
        for mode in MODES
    }
    assert sizes["noise", "fixed"] < sizes["noise", "plain"]
    assert sizes["walk", "outlier"] < 0.5 * sizes["walk", "plain"]


def test_far_out_values_are_coded_as_the_last_bin_and_patched() -> None:
    array = gaussian((64, 64), "F32")
    array[3, 4], array[5, 6], array[7, 8], array[9, 9] = 1e30, -1e30, np.nan, -np.inf
    data = encode(array, 0.003, codec="cuszp")
    assert {3 * 64 + 4, 5 * 64 + 6, 7 * 64 + 8, 9 * 64 + 9} <= set(parse(data).misses.tolist())
    assert not len(broken(array, np.asarray(decode(data)), 0.003))
    found = decode_stream(encode_stream(array, 0.003), array.size, 0.003).reshape(array.shape)
    assert found[3, 4] == np.float32(2**30 - 64) * np.float32(0.003) * 2
    assert found[5, 6] == -found[3, 4]
    assert found[7, 8] == found[9, 9] == 0.0


def test_non_finite_values_cost_their_block_nothing() -> None:
    x = np.zeros(BLOCK, np.float32)
    x[3], x[7], x[9] = np.nan, np.inf, -np.inf
    assert len(encode_stream(x, 0.1)) == table_n_bytes(BLOCK)


def test_an_empty_array_has_no_bytes() -> None:
    assert encode_stream(np.empty((3, 0), np.float32), 0.1) == b""
    assert decode_stream(b"", 0, 0.1).shape == (0,)
    with pytest.raises(CorruptionError):
        decode_stream(b"\0", 0, 0.1)


@pytest.mark.parametrize("bound", [0.0, -1.0, 2.0**-127, 2.0**126, np.inf, np.nan])
def test_bounds_that_the_stream_cannot_have(bound: float) -> None:
    with pytest.raises(BoundError, match=r"expected 2\^-126 to 2\^125"):
        encode_stream(np.ones(4, np.float32), bound)
    with pytest.raises(BoundError):
        decode_stream(bytes(1024), 4, bound)


@pytest.mark.parametrize("bound", [2.0**-126, 2.0**125])
def test_the_bounds_at_the_ends(bound: float) -> None:
    x = np.array([bound, -bound, 3 * bound, 0.2 * bound], np.float32)
    found = decode_stream(encode_stream(x, bound), 4, bound)
    assert np.array_equal(found, np.array([2 * bound, 0, 4 * bound, 0], np.float32))


def test_what_is_no_float32_and_no_mode() -> None:
    with pytest.raises(CodecError, match="float32"):
        encode_stream(np.ones(4), 0.1)
    with pytest.raises(CodecError, match="fixed, plain, outlier"):
        encode_stream(np.ones(4, np.float32), 0.1, mode="3d")
    with pytest.raises(CodecError, match="fixed, plain, outlier"):
        encode(np.ones(4, np.float32), 0.1, codec="cuszp:fastest")
    with pytest.raises(CodecError, match="lossless"):
        CuszpCodec().compress(np.ones(4, np.float32), ArraySpec((4,), "F32", "F32", 0.0))


class TestDamage:
    """Each of these is refused before anything is read by it."""

    x = gaussian((40, 100), "F32").reshape(-1)

    def refuse(self, stream: bytes | bytearray, mode: str, match: str) -> None:
        for isa in ISAS:
            with using(isa), pytest.raises(CorruptionError, match=match):
                decode_stream(stream, self.x.size, 0.003, mode=mode)
        with pytest.raises(CorruptionError):
            reference.decode_stream(bytes(stream), self.x.size, 0.003, mode)

    @every_mode
    def test_lengths(self, mode: str) -> None:
        stream = encode_stream(self.x, 0.003, mode=mode)
        self.refuse(stream[:-1], mode, "the rates say")
        self.refuse(stream + b"\0", mode, "the rates say")
        self.refuse(stream[:1023], mode, "cannot hold 4000 values")

    @every_mode
    def test_rates(self, mode: str) -> None:
        stream = encode_stream(self.x, 0.003, mode=mode)
        for code in (32, 64, 127) if mode == "outlier" else (32, 64, 127, 128, 255):
            damaged = bytearray(stream)
            damaged[5] = code
            self.refuse(damaged, mode, f"rate byte {code}")
        damaged = bytearray(stream)
        damaged[4000 // BLOCK], damaged[4000 // BLOCK - 1] = damaged[4000 // BLOCK - 1], 0
        self.refuse(damaged, mode, "behind the last block")

    def test_a_forged_number_of_values(self) -> None:
        with pytest.raises(CorruptionError, match="cannot hold"):
            decode_stream(bytes(2048), 1 << 50, 0.1)
        with pytest.raises(CorruptionError):
            decode_stream(b"", -1, 0.1)

    @pytest.mark.parametrize(
        "header",
        [b"", b"\0\0\0\x80", *(struct.pack("<Bf", *h) for h in [(3, 0.1), (0, 0), (1, np.nan)])],
    )
    def test_headers_of_payloads(self, header: bytes) -> None:
        spec, out = ArraySpec((4,), "F32", "F32", 0.1), np.empty(4, np.float32)
        with pytest.raises(CorruptionError, match="cuszp: expected"):
            CuszpCodec().decompress(memoryview(header + b"\0" * (len(header) // 5)), spec, out)

    def test_sums_of_damaged_differences_wrap_alike(self) -> None:
        rng = np.random.default_rng(3)
        n = 2048
        codes = np.zeros(1024, np.uint8)
        codes[: n // BLOCK] = rng.integers(128, 256, n // BLOCK)
        n_bytes = 4 + 4 * (codes & 31).astype(int) + (codes >> 5 & 3) + 1
        payload = rng.bytes(int(n_bytes[codes > 0].sum()))
        expected = reference.decode_stream(codes.tobytes() + payload, n, 0.1, "outlier")
        for isa in ISAS:
            with using(isa):
                found = decode_stream(codes.tobytes() + payload, n, 0.1, mode="outlier")
            assert np.array_equal(bits(found), bits(expected))


def test_the_options_in_words() -> None:
    assert repr(CuszpCodec.from_options("fixed")) == "CuszpCodec('fixed')"
    assert CuszpCodec.from_options("").mode == "plain"
