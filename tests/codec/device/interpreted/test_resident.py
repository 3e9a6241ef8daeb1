"""Arrays whose metadata stays on the device: any of them, in any company, from anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moebound import decode, encode
from moebound.codec.arrays import torch_dtype
from moebound.codec.device import PreparedDecode, Resident, Schedule, read_stream
from moebound.codec.device.launch import MOST_WIDE
from moebound.codec.device.resident import resident_bytes
from moebound.errors import CodecError, CorruptionError

from ... import weights
from .launching import MANY, patterns
from .test_decode_kernel import ENCODED

NAMES = ("many tables", "low bits", "patches", "float16", "float32", "one weight", "exact copy")
STREAMS = [read_stream(ENCODED[name]) for name in NAMES]


def launched(
    resident: Resident, arrays: list[int], offsets: list[int], *, spoil: int | None = None
) -> list[torch.Tensor]:
    """What comes out, from a buffer of noise with the envelopes in it. spoil: a byte to change."""
    ends = [at + STREAMS[i].n_bytes for i, at in zip(arrays, offsets, strict=True)]
    noise = np.random.default_rng(0).integers(0, 256, max(ends) + 9).astype(np.uint8)
    for i, at in zip(arrays, offsets, strict=True):
        noise[at : at + STREAMS[i].n_bytes] = np.frombuffer(ENCODED[NAMES[i]], np.uint8)
    if spoil is not None:
        noise[spoil] ^= 1
    outs = [
        torch.full((STREAMS[i].spec.size,), -7.0, dtype=torch_dtype(STREAMS[i].spec.dtype))
        for i in arrays
    ]
    resident.launch(arrays, offsets, torch.from_numpy(noise), outs, MANY).check()
    return outs


@pytest.mark.parametrize(
    ("arrays", "gaps", "tables"),
    [
        ([5], [3], True),
        ([2, 0], [0, 7], True),
        ([4, 1, 3], [16, 1, 2], False),
        ([6, 4, 5, 6], [1, 1, 1, 1], True),
    ],
)
def test_any_company_from_anywhere(arrays: list[int], gaps: list[int], tables: bool) -> None:
    offsets, at = [], 0
    for i, gap in zip(arrays, gaps, strict=True):
        offsets.append(at + gap)
        at = offsets[-1] + STREAMS[i].n_bytes
    found = launched(Resident(STREAMS, "cpu", tables=tables), arrays, offsets)
    for i, out in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(patterns(out), patterns(decode(ENCODED[NAMES[i]])))


@pytest.mark.parametrize("wide", [True, None])
def test_kept_tables_are_expanded_once_and_counted(
    wide: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of sixteen classes are kept in one form; asked for in the other, they are expanded."""
    streams = STREAMS[:2]
    plain, kept = Resident(streams, "cpu"), Resident(streams, "cpu", tables=True)
    slots = [int(s.coded.n_tables) << s.coded.table_log for s in streams if s.coded is not None]
    assert 4 * slots[0] > MOST_WIDE >= 4 * slots[1]
    assert kept.n_bytes - plain.n_bytes == sum(slots) + 4 * slots[1]
    assert kept.n_bytes <= sum(resident_bytes([stream]) for stream in streams)
    assert resident_bytes(streams) == kept.n_bytes
    expanded = list[int]()

    def counted(prepared: PreparedDecode) -> None:
        expanded.append(len(prepared.jobs))
        expand(prepared)

    monkeypatch.setattr(PreparedDecode, "expand", counted)
    schedule, size = Schedule(together=32, wide=wide), max(s.n_bytes for s in streams)
    for i in (0, 1):
        compressed = torch.zeros(size, dtype=torch.uint8)
        data = ENCODED[NAMES[i]]
        compressed[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        out = torch.zeros(streams[i].spec.size, dtype=torch_dtype(streams[i].spec.dtype))
        kept.launch([i], [0], compressed, [out], schedule).check()
        np.testing.assert_array_equal(patterns(out), patterns(decode(data)))
    assert expanded == ([1] if wide else [])


expand = PreparedDecode.expand


def test_it_may_be_launched_again_and_again() -> None:
    resident = Resident(STREAMS, "cpu")
    first = launched(resident, [3], [0])
    launched(resident, [0], [5])
    assert torch.equal(launched(resident, [3], [2])[0], first[0])
    assert 0 < resident.n_bytes < sum(stream.n_bytes for stream in STREAMS)


def test_damage_is_named_by_the_arrays_number() -> None:
    coded = STREAMS[3].coded
    assert coded is not None
    with pytest.raises(CorruptionError, match=r"array 3 of 7 \(codec 'bound', shape \(64, 512\)\)"):
        launched(Resident(STREAMS, "cpu"), [5, 3], [0, 4000], spoil=4000 + int(coded.segments[2]))


def test_what_does_not_fit_is_refused() -> None:
    resident = Resident(STREAMS, "cpu")
    size = STREAMS[3].n_bytes
    out = torch.zeros(64, 512, dtype=torch.float16)
    with pytest.raises(CodecError, match="bytes or more"):
        resident.launch([3], [1], torch.zeros(size, dtype=torch.uint8), [out], MANY)
    with pytest.raises(CodecError, match="none below 0"):
        resident.launch([3], [-1], torch.zeros(size, dtype=torch.uint8), [out], MANY)
    with pytest.raises(CodecError, match=r"outs\[0\]"):
        resident.launch([3], [0], torch.zeros(size, dtype=torch.uint8), [out[1:]], MANY)
    for number in (-1, 7, True, 3.0):
        with pytest.raises(CodecError, match="arrays: number"):
            resident.launch([number], [0], torch.zeros(size, dtype=torch.uint8), [out], MANY)  # type: ignore[list-item]
    with pytest.raises(CodecError, match="offsets: expected 2"):
        resident.launch([3, 3], [0], torch.zeros(size, dtype=torch.uint8), [out], MANY)
    with pytest.raises(CodecError, match=r"outs\[0\] and outs\[1\] overlap"):
        resident.launch([3, 3], [0, 0], torch.zeros(size, dtype=torch.uint8), [out, out], MANY)
    raw = read_stream(encode(weights.gaussian((4, 4)), 0.01, codec="raw"))
    with pytest.raises(CodecError, match="array 1: codec 'raw' is not decoded on a device"):
        Resident([STREAMS[0], raw], "cpu")
