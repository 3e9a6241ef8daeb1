"""Envelopes as the device needs them: parsed and checked on the host."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from moebound import decode, encode
from moebound.codec import envelope, fields
from moebound.codec.bound import BoundCodec
from moebound.codec.device import read_stream
from moebound.codec.device.stream import Coded
from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.layout import read_layout
from moebound.errors import CorruptionError, FormatError

from .. import weights
from ..stepped import Stepped, drawn_levels


def encoded(segment_weights: int = 4096, spread: float = 0.6) -> bytes:
    rng = np.random.default_rng(1)
    array = weights.gaussian((96, 500), "F32")
    array *= np.exp(spread * rng.standard_normal((96, 1))).astype(np.float32)
    return encode(array, 0.003, codec=BoundCodec(segment_weights=segment_weights))


def frequencies(coded: Coded) -> list[list[int]]:
    """Of each table, from where its symbols begin."""
    begins = (coded.symbols >> 12).tolist()
    return [np.diff([*table, 1 << coded.table_log]).tolist() for table in begins]


def resealed(data: bytes, at: int, value: int) -> bytes:
    """With one byte of it changed, and a checksum that matches."""
    changed = bytearray(data)
    changed[at] = value
    changed[-4:] = fields.checksum(changed[:-4]).to_bytes(4, "little")
    return bytes(changed)


def test_a_stream_says_what_the_header_says() -> None:
    data = encoded()
    parsed = envelope.parse(data)
    read = ByteReader(bytes(parsed.payload))
    layout = read_layout(read, parsed.spec.size)
    coded = read_stream(data).coded
    assert coded is not None
    assert coded.n_tables > 1
    present = [[max(f - 1, 0) for f in table] for table in layout.tables]
    assert (coded.symbols & 0xFFF).tolist() == present
    assert frequencies(coded) == layout.tables
    assert coded.row_classes.tolist() == layout.row_classes
    assert coded.column_classes.tolist() == layout.column_classes
    assert coded.words.tolist() == layout.segment_words
    for name in ("table_log", "lanes_log", "low_bits", "columns", "rows_per_segment", "symbol_low"):
        assert getattr(coded, name) == getattr(layout, name), name
    assert coded.segments[0] == len(data) - 4 - len(parsed.payload) + read.at


def test_segments_lie_behind_one_another_and_end_with_the_payload() -> None:
    data = encoded()
    coded = read_stream(data).coded
    assert coded is not None
    assert coded.low_bits == 0
    sizes = [4 * 32 + -(-2 * int(words) // 4) * 4 for words in coded.words]
    assert [b - a for a, b in pairwise(coded.segments.tolist())] == sizes[:-1]
    assert coded.segments[-1] + sizes[-1] == len(data) - 4


def test_values_are_those_that_the_decoder_gives() -> None:
    data = encoded(spread=0.0)
    coded = read_stream(data).coded
    assert coded is not None
    decoded = decode(data)
    assert isinstance(decoded, np.ndarray)
    assert set(weights.bits(decoded).tolist()) <= set(coded.values.tolist())


@pytest.mark.parametrize("codec", ["raw", "sz3", "zfp"])
def test_other_codecs_are_decoded_on_the_host(codec: str) -> None:
    array = weights.gaussian((40, 40), "F32")
    stream = read_stream(encode(array, 0.01, codec=codec))
    assert stream.coded is None
    assert stream.decoded is not None
    np.testing.assert_array_equal(
        stream.decoded, np.asarray(decode(encode(array, 0.01, codec=codec))).reshape(-1)
    )
    assert len(stream.positions) == 0  # the patch is in place


@pytest.mark.parametrize("by_row", [False, True])
def test_steps_come_with_the_factors_of_the_other_side(by_row: bool) -> None:
    levels, factors = drawn_levels(48, 9), drawn_levels(80, 7, 1)
    array = weights.gaussian((48, 80) if by_row else (80, 48))
    made = Stepped.of(array, levels, 0.01, by_row=by_row, factors=factors)
    stream = read_stream(made.envelope())
    coded = stream.coded
    assert coded is not None
    assert stream.decoded is None
    assert not coded.exact
    assert coded.by_row == by_row
    np.testing.assert_array_equal(coded.steps, made.steps.sizes(0.01))
    np.testing.assert_array_equal(coded.factors, made.steps.factors)


def test_a_patch_comes_with_its_positions() -> None:
    array = weights.gaussian((40, 40), "BF16")
    array[3, 4], array[39, 39] = np.nan, np.inf
    stream = read_stream(encode(array, 0.01))
    assert stream.positions.tolist() == [3 * 40 + 4, 40 * 40 - 1]
    assert stream.patches.tolist() == weights.bits(array)[stream.positions].tolist()


def test_damage_to_any_byte_of_a_header_is_found_or_harmless() -> None:
    """What the host takes for good has every segment inside the envelope."""
    data = encoded(segment_weights=16384)
    parsed = envelope.parse(data)
    begin = len(data) - 4 - len(parsed.payload)
    first = read_stream(data).coded
    assert first is not None
    refused = 0
    for at in range(begin, int(first.segments[0])):
        for value in (data[at] ^ 0xFF, data[at] ^ 1, 0xFF):
            if at == begin and value == 0:
                continue
            try:
                coded = read_stream(resealed(data, at, value)).coded
            except CorruptionError:
                refused += 1
                continue
            assert coded is not None
            ends = coded.segments + 4 * (1 << coded.lanes_log) + 2 * coded.words.astype(np.int64)
            assert coded.segments.min() >= begin
            assert ends.max() <= len(data) - 4
            assert {sum(table) for table in frequencies(coded)} == {1 << coded.table_log}
    assert refused > 50


def test_a_shape_that_the_bytes_cannot_fill_is_refused_before_any_memory() -> None:
    spec = envelope.parse(encode(weights.gaussian((64,)), 0.01)).spec
    huge = envelope.Envelope(
        type(spec)((1 << 32,), "BF16", "BF16", 0.01),
        "bound",
        1,
        memoryview(bytes(64)),
        np.empty(0, np.uint64),
        np.empty(0, np.uint16),
    )
    with pytest.raises(CorruptionError, match="hold at most"):
        read_stream(envelope.build(huge))


def test_a_later_version_is_not_guessed_at() -> None:
    data = encode(weights.gaussian((64,)), 0.01)
    at = data.index(b"bound") + 5
    with pytest.raises(FormatError, match="version 9"):
        read_stream(resealed(data, at, 9))
