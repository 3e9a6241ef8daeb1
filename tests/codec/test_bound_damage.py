"""Codec `bound`: damaged payloads and wrong arguments are refused, by every path alike."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from moebound import _native, decode, encode
from moebound.codec import envelope
from moebound.codec.bound import SCALED
from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.layout import Layout, read_layout, write_layout
from moebound.codec.reference.rans import read_segment, write_segment
from moebound.errors import CorruptionError
from moebound.types import DType

from .kernel import ISAS, kernel_decode, kernel_encode, using
from .stepped import Stepped, drawn_levels, odd
from .weights import gaussian, scaled_both_ways


def _in_lanes(payload: bytes, n: int, lanes_log: int) -> bytes:
    """The same symbols in another number of lanes: small payloads for the vector paths."""
    read = ByteReader(payload)
    layout = read_layout(read, n)
    parts = list(zip(layout.segments(n), layout.segment_words, strict=True))
    coded = [read_segment(read, layout, rows, n, n_words) for rows, n_words in parts]
    layout.lanes_log = lanes_log
    layout.segment_words = []
    segments = b""
    for (rows, _), (symbols, lows) in zip(parts, coded, strict=True):
        cuts = [slice(i * layout.columns, (i + 1) * layout.columns) for i in range(len(rows))]
        data, n_words = write_segment(
            [symbols[cut] for cut in cuts], [lows[cut] for cut in cuts], layout, rows
        )
        segments += data
        layout.segment_words.append(n_words)
    return write_layout(layout) + segments


def _small_payloads() -> dict[str, tuple[bytes, int, float, DType]]:
    """Of about 200 bytes, with each part that a payload can have."""
    plain, _ = kernel_encode(gaussian((9, 37)), 0.006, segment_weights=150)
    fine, _ = kernel_encode(gaussian((4, 40), "F16"), 2e-4)
    wide, _ = kernel_encode(scaled_both_ways((20, 35), "F32", 1.0), 0.01)
    exact, _ = kernel_encode(gaussian((3, 41)), 0.0)
    steps = Stepped.of(gaussian((9, 37)), drawn_levels(37, 9), 0.01)
    rows = Stepped.of(odd(gaussian((20, 35), "F32")), drawn_levels(20, 20), 0.02, by_row=True)
    fine_steps = Stepped.of(gaussian((4, 40), "F16"), drawn_levels(40, 3), 5e-5)
    stepped: dict[str, tuple[bytes, int, float, DType]] = {
        "steps": (steps.payload(segment_weights=150)[0], 9 * 37, 0.01, "BF16"),
        "steps, 32 lanes": (_in_lanes(steps.payload()[0], 9 * 37, 5), 9 * 37, 0.01, "BF16"),
        "steps of rows": (_in_lanes(rows.payload()[0], 700, 5), 700, 0.02, "F32"),
        "steps, low bits": (_in_lanes(fine_steps.payload()[0], 160, 5), 160, 5e-5, "F16"),
    }
    return stepped | {
        "one lane": (plain, 9 * 37, 0.006, "BF16"),
        "32 lanes": (_in_lanes(plain, 9 * 37, 5), 9 * 37, 0.006, "BF16"),
        "low bits": (_in_lanes(fine, 160, 5), 160, 2e-4, "F16"),
        "tables": (_in_lanes(wide, 700, 5), 700, 0.01, "F32"),
        "exact": (_in_lanes(exact, 123, 5), 123, 0.0, "BF16"),
    }


SMALL = _small_payloads()


def _verdict(payload: bytes, n: int, bound: float, dtype: DType) -> bytes | None:
    """What every path decodes this to; None if all of them refuse it."""
    verdicts: set[bytes | None] = set()
    for isa in ISAS:
        with using(isa):
            try:
                verdicts.add(kernel_decode(payload, n, bound, dtype=dtype).tobytes())
            except _native.Corrupt:
                verdicts.add(None)
    assert len(verdicts) == 1, f"{ISAS} disagree on {payload.hex()}"
    return verdicts.pop()


small = pytest.mark.parametrize("name", SMALL)


@small
def test_whole_payloads_are_accepted(name: str) -> None:
    assert _verdict(*SMALL[name]) is not None


@small
def test_truncated(name: str) -> None:
    payload, n, bound, dtype = SMALL[name]
    for n_bytes in range(len(payload)):
        assert _verdict(payload[:n_bytes], n, bound, dtype) is None
    assert _verdict(payload + b"\0", n, bound, dtype) is None


@small
def test_every_single_bit(name: str) -> None:
    payload, n, bound, dtype = SMALL[name]
    n_refused = 0
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        n_refused += _verdict(bytes(damaged), n, bound, dtype) is None
    # Low bits, padding and values of symbols say nothing about each other; the rest does.
    assert n_refused > 2 * len(payload)


@small
def test_mutations(name: str) -> None:
    payload, n, bound, dtype = SMALL[name]
    rng = np.random.default_rng(11)
    for _ in range(600):
        damaged = bytearray(payload)
        for _ in range(rng.integers(1, 6)):
            end = len(damaged) if rng.random() < 0.5 else min(16, len(damaged))
            at = int(rng.integers(0, end))
            choice = rng.integers(0, 5)
            if choice == 0:
                del damaged[at]
            elif choice == 1:
                damaged.insert(at, int(rng.integers(0, 256)))
            elif choice == 2:
                damaged[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
            else:
                damaged[at] = int(rng.integers(0, 256))
        _verdict(bytes(damaged), n, bound, dtype)


@small
@pytest.mark.parametrize("n", [1, 31, 100, 10_000, 1 << 22])
def test_another_size(name: str, n: int) -> None:
    """An envelope that lies about the shape: no more memory than the values asked for."""
    payload, _, bound, dtype = SMALL[name]
    _verdict(payload, n, bound, dtype)


def test_random_bytes() -> None:
    rng = np.random.default_rng(12)
    for _ in range(500):
        head = bytes([12, 5, int(rng.integers(0, 9)), 1, 3]) if rng.random() < 0.7 else b""
        if rng.random() < 0.3:
            head = bytes([SCALED + int(rng.integers(0, 8)), 0, 0x40, 0x5C])
        payload = head + rng.bytes(int(rng.integers(0, 200)))
        if payload[:1] != b"\0":
            _verdict(payload, 300, 0.01, "BF16")


def test_damage_names_the_codec() -> None:
    parsed = envelope.parse(encode(gaussian((50, 40)), 0.01))
    cut = envelope.Envelope(
        parsed.spec, parsed.codec, 1, parsed.payload[:-4], parsed.misses, parsed.values
    )
    with pytest.raises(CorruptionError, match="bound: payload ends early"):
        decode(envelope.build(cut))


def test_what_the_kernel_refuses() -> None:
    array: npt.NDArray[np.float32] = np.ones(10, np.float32)
    for bound in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="bound"):
            kernel_encode(array, bound)
    with pytest.raises(ValueError, match="exact copy"):
        kernel_encode(array, 0.0)
    for columns in (0, (1 << 16) + 1):
        with pytest.raises(ValueError, match="size"):
            kernel_encode(array, 0.1, columns=columns)
    for segment_weights in (0, (1 << 18) + 1):
        with pytest.raises(ValueError, match="segment_weights"):
            kernel_encode(array, 0.1, segment_weights=segment_weights)
    with pytest.raises(ValueError, match="instruction set"):
        _native.use_isa("mmx")


def test_a_tiny_payload_cannot_ask_for_a_huge_grid() -> None:
    layout = Layout(
        table_log=1, lanes_log=0, low_bits=8, columns=1, rows_per_segment=1,
        symbol_low=1 << 17, n_symbols=1, tables=[[2]], rests=[0],
    )  # fmt: skip
    segment, n_words = write_segment([[0]], [[0]], layout, range(1))
    layout.segment_words = [n_words]
    with pytest.raises(_native.Corrupt, match="grid"):
        _native.bound_decode(write_layout(layout) + segment, np.zeros(1, np.float32), 2, 1e-9, 1)
