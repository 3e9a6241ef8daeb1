"""Batches: where bytes stand, and what is refused before anything is launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moebound import encode
from moebound.codec import envelope
from moebound.codec.bound import BoundCodec
from moebound.codec.device import DecodeBatch, Schedule, decode_to, launch, read_stream
from moebound.codec.device.batch import check_outs
from moebound.errors import BackendUnavailable, CodecError, CorruptionError, FormatError

from .. import weights
from ..stepped import Stepped, drawn_levels

CODEC = BoundCodec(segment_weights=4096)


def envelopes() -> list[bytes]:
    shapes = ((40, 512), (7, 33), (64, 300))
    return [encode(weights.gaussian(s, seed=i), 0.004, codec=CODEC) for i, s in enumerate(shapes)]


def outs() -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((40, 512), (7, 33), (64, 300))]


def test_envelopes_stand_apart_with_their_segments_aligned() -> None:
    data = envelopes()
    batch = DecodeBatch.of(data)
    assert batch.aligned
    end = 0
    for stream, offset in zip(batch.streams, batch.offsets, strict=True):
        assert offset >= end
        assert stream.coded is not None
        assert (stream.coded.segments + offset).max() % 4 == 0
        end = offset + stream.n_bytes
    assert batch.n_bytes == end


def test_pack_puts_each_envelope_at_its_offset() -> None:
    data = envelopes()
    batch = DecodeBatch.of(data)
    packed = torch.zeros(batch.n_bytes, dtype=torch.uint8)
    batch.pack(data, packed)
    for offset, each in zip(batch.offsets, data, strict=True):
        assert packed[offset : offset + len(each)].numpy().tobytes() == each
    with pytest.raises(CodecError, match="bytes or more"):
        batch.pack(data, packed[:-1])
    with pytest.raises(CodecError, match="expected an envelope of"):
        batch.pack([data[0], data[0], data[2]], packed)


def test_streams_may_be_kept_for_another_batch() -> None:
    streams = [read_stream(data) for data in envelopes()]
    assert DecodeBatch.of(streams).n_bytes == DecodeBatch.of(envelopes()).n_bytes
    odd = DecodeBatch.of(streams[:1], offsets=[streams[0].alignment_offset + 1])
    assert not odd.aligned


@pytest.mark.parametrize("by_row", [False, True])
def test_a_row_of_a_matrix_with_factors_takes_a_byte(by_row: bool) -> None:
    """And what the kernels multiply by is the step of each weight."""
    levels, others = (drawn_levels(n, 9, seed) for seed, n in enumerate((120, 90)))
    array = weights.gaussian((120, 90) if by_row else (90, 120))
    plain = Stepped.of(array, levels, 0.01, by_row=by_row)
    made = Stepped.of(array, levels, 0.01, by_row=by_row, factors=others)
    known = DecodeBatch.of([plain.envelope(), made.envelope()]).metadata

    def section(name: str, dtype: type) -> Any:
        return known.block[known.sections[name] :].view(dtype)

    steps_at, numbers_at = (section("arrays", np.int64)[23:46][i] for i in (20, 22))
    assert steps_at == len(levels)
    of_columns, different = np.split(section("steps", np.float32)[steps_at:], [array.shape[1]])
    numbers = section("classes", np.uint8)[numbers_at:][: len(array)]
    assert numbers.max() == 9  # of ten levels
    assert known.sections["values16"] - known.sections["steps"] <= 4 * (120 + array.shape[1] + 13)
    np.testing.assert_array_equal(of_columns * different[numbers][:, None], made.sizes)


@pytest.mark.parametrize("offsets", [[0], [0, 1, -4]])
def test_offsets_that_cannot_be_are_refused(offsets: list[int]) -> None:
    with pytest.raises(CodecError, match="offsets: expected 3, none below 0"):
        DecodeBatch.of(envelopes(), offsets=offsets)


def test_tensors_that_do_not_fit_are_refused() -> None:
    batch = DecodeBatch.of(envelopes())
    good = torch.zeros(batch.n_bytes, dtype=torch.uint8)
    for compressed, message in [
        (good[:-1], "bytes or more"),
        (good.view(torch.int8), "flat tensor of uint8"),
        (torch.zeros(batch.n_bytes + 1, dtype=torch.uint8)[1:], "even address"),
    ]:
        with pytest.raises(CodecError, match=message):
            batch.launch(compressed, outs())
    with pytest.raises(CodecError, match="expected 3 tensors, found 2"):
        batch.launch(good, outs()[:2])
    for i, wrong in [
        (0, torch.zeros(40, 511, dtype=torch.bfloat16)),
        (1, torch.zeros(7, 33)),
        (2, torch.zeros(300, 64, dtype=torch.bfloat16).T),
    ]:
        tensors = outs()
        tensors[i] = wrong
        with pytest.raises(CodecError, match=rf"outs\[{i}\]"):
            batch.launch(good, tensors)


@pytest.mark.parametrize("offsets", [[0.0, 4000, 9000], [0, True, 9000], [0, "4000", 9000]])
def test_offsets_are_whole_numbers(offsets: list[Any]) -> None:
    with pytest.raises(CodecError, match="offsets: expected 3"):
        DecodeBatch.of(envelopes(), offsets=offsets)


def test_outs_over_one_another_are_refused() -> None:
    batch = DecodeBatch.of(envelopes())
    compressed = torch.zeros(batch.n_bytes, dtype=torch.uint8)
    whole = torch.zeros(64 * 300, dtype=torch.bfloat16)
    first, second, third = outs()
    with pytest.raises(CodecError, match=r"outs\[[12]\] and outs\[[12]\] overlap"):
        batch.launch(compressed, [first, whole[-7 * 33 :], whole])
    with pytest.raises(CodecError, match=r"outs\[[01]\] and outs\[[01]\] overlap"):
        batch.launch(compressed, [first, first.view(-1)[: 7 * 33], third])
    both = torch.zeros(batch.n_bytes + 2 * 64 * 300, dtype=torch.uint8)
    over = both[batch.n_bytes - 2 - batch.n_bytes % 2 :][: 2 * 64 * 300].view(torch.bfloat16)
    with pytest.raises(CodecError, match=r"compressed and outs\[2\] overlap"):
        batch.launch(both[: batch.n_bytes], [first, second, over])


def test_autograd_hears_that_outs_will_change() -> None:
    specs = [stream.spec for stream in DecodeBatch.of(envelopes()).streams]
    weights_of, x = outs(), torch.ones(512, dtype=torch.bfloat16, requires_grad=True)
    lost = (weights_of[0] @ x).sum()
    check_outs(specs, weights_of, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lost.backward()  # type: ignore[no-untyped-call]


def test_views_side_by_side_are_fine() -> None:
    specs = [stream.spec for stream in DecodeBatch.of(envelopes()).streams]
    whole = torch.zeros(sum(spec.size for spec in specs), dtype=torch.bfloat16)
    parts = whole.split([spec.size for spec in specs])  # type: ignore[no-untyped-call]
    check_outs(specs, parts, torch.zeros(8, dtype=torch.uint8))
    check_outs([specs[0], replace(specs[0], shape=(0,))], [outs()[0], whole[:0]], whole)


def test_a_forged_shape_is_refused_on_the_host() -> None:
    parsed = envelope.parse(encode(np.zeros((16, 64), np.float32), 0.01))
    for shape, message in (((1 << 40,), "hold at most"), ((1 << 28, 2), "were expected")):
        payload = memoryview(bytes(parsed.payload) + bytes(20_000 if len(shape) == 2 else 0))
        spec = replace(parsed.spec, shape=shape)
        data = envelope.build(replace(parsed, spec=spec, payload=payload))
        with pytest.raises(FormatError, match=message):
            read_stream(data)
        with pytest.raises(FormatError, match=message):
            decode_to(data, "cpu")
    for codec in ("bound", "raw"):
        data = encode(np.zeros((16, 64), np.float32), 0.01, codec=codec)
        assert read_stream(data, max_bytes=4096).spec.size == 1024
        with pytest.raises(FormatError, match="at most 4095"):
            read_stream(data, max_bytes=4095)
        with pytest.raises(FormatError, match="at most 4095"):
            decode_to(data, "cpu", max_bytes=4095)


@pytest.mark.parametrize("together", [0, 3, 64, True, 2.0, -1])
def test_segments_of_a_program_are_a_power_of_two(together: Any) -> None:
    with pytest.raises(CodecError, match="together"):
        Schedule(together=together)


def test_many_small_arrays_beside_a_large_one_take_no_room_by_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "MOST_PLACES", 14)
    batch = DecodeBatch.of(envelopes())  # of 5 segments, of 1 and of 5
    with pytest.raises(CodecError, match=r"3 arrays of up to 5 segments, .* split it"):
        batch.launch(torch.zeros(batch.n_bytes, dtype=torch.uint8), outs())


def test_the_cpu_is_no_device() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    with pytest.raises(BackendUnavailable, match="on the CPU use"):
        decode_to(envelopes(), "cpu")


def test_what_the_host_can_see_is_refused_when_a_batch_is_made() -> None:
    data = bytearray(envelopes()[0])
    data[-40] ^= 1
    with pytest.raises(CorruptionError, match="checksum"):
        DecodeBatch.of([bytes(data)])


def test_arrays_that_the_host_decodes_need_no_kernel() -> None:
    array = weights.gaussian((16, 16), "F32")
    (found,) = decode_to(encode(array, 0.01, codec="raw"), "cpu")
    np.testing.assert_array_equal(found.numpy(), array)
    (empty,) = decode_to(encode(array[:0], 0.01), "cpu")
    assert empty.shape == (0, 16)
