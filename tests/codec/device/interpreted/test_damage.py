"""Damaged states and words: reported for their segment, and read nothing but their own bytes."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moebound import encode
from moebound.codec.bound import BoundCodec
from moebound.codec.device import DecodeBatch, Stream, read_stream
from moebound.errors import CorruptionError

from ... import weights
from .fence import Fenced
from .launching import MANY

DATA = encode(weights.gaussian((64, 512)), 0.005, codec=BoundCodec(segment_weights=1024))
PLANES = encode(weights.gaussian((64, 512)), 0.0001, codec=BoundCodec(segment_weights=1024))


def segment_of(stream: Stream, i: int) -> slice:
    """The states and words of a segment."""
    assert stream.coded is not None
    first = int(stream.coded.segments[i])
    return slice(first, first + 4 * 32 + 2 * int(stream.coded.words[i]))


def launch(stream: Stream, compressed: torch.Tensor) -> tuple[torch.Tensor, str]:
    """What came out, and what was said."""
    batch = DecodeBatch.of([stream], offsets=[stream.alignment_offset])
    out = torch.zeros(64, 512, dtype=torch.bfloat16)
    launched = batch.launch(compressed, [out], MANY)
    try:
        launched.check()
    except CorruptionError as error:
        return out, str(error)
    return out, ""


def placed(stream: Stream, data: bytes) -> torch.Tensor:
    return torch.tensor(list(bytes(stream.alignment_offset) + data), dtype=torch.uint8)


def hostile(rng: np.random.Generator, data: bytes, where: slice) -> bytes:
    """With these bytes random: states of any size, as many words wanted as may be."""
    changed = np.frombuffer(data, np.uint8).copy()
    size = where.stop - where.start
    changed[where] = rng.integers(0, 256, size) if rng.random() < 0.5 else rng.integers(0, 2, size)
    return changed.tobytes()


@pytest.mark.parametrize("data", [DATA, PLANES], ids=["words", "words and planes"])
def test_a_damaged_segment_is_named(data: bytes) -> None:
    rng = np.random.default_rng(0)
    stream = read_stream(data)
    good, said = launch(stream, placed(stream, data))
    assert said == ""
    for i in (0, 13, 31):
        out, said = launch(stream, placed(stream, hostile(rng, data, segment_of(stream, i))))
        assert f"segment {i} of 32 is damaged" in said
        assert "1 damaged segments in all" in said
        others = [row for row in range(64) if row // 2 != i]
        assert torch.equal(out[others], good[others])


def test_one_flipped_bit_is_found_wherever_it_is() -> None:
    rng = np.random.default_rng(1)
    stream = read_stream(DATA)
    where = segment_of(stream, 5)
    for at in rng.integers(where.start, where.stop, 6):
        changed = bytearray(DATA)
        changed[at] ^= 1 << int(rng.integers(8))
        _, said = launch(stream, placed(stream, bytes(changed)))
        assert "segment 5 of 32" in said


def test_a_segment_reads_nothing_but_itself() -> None:
    """What stands around a hostile segment makes no difference to what it decodes to."""
    rng = np.random.default_rng(2)
    stream = read_stream(DATA)
    where = segment_of(stream, 9)
    evil = np.frombuffer(hostile(rng, DATA, where), np.uint8)
    outs = []
    for _ in range(2):
        around = rng.integers(0, 256, len(DATA)).astype(np.uint8)
        around[where] = evil[where]
        out, said = launch(stream, placed(stream, around.tobytes()))
        assert "damaged" in said
        outs.append(out.view(torch.int16)[18:20])
    assert torch.equal(*outs)


def test_nothing_is_read_outside_the_buffer() -> None:
    """The buffer stands between pages that cannot be read: a stray read would end this process."""
    rng = np.random.default_rng(3)
    stream = read_stream(DATA)
    batch = DecodeBatch.of([stream])
    last = segment_of(stream, 31)
    with Fenced(batch.n_bytes) as fenced:
        for _ in range(4):
            changed = hostile(rng, DATA, last)
            fenced.copy_(placed(stream, changed))
            _, said = launch(stream, fenced)
            assert "segment 31 of 32" in said


def test_the_fence_holds() -> None:
    """Else the test above could not fail."""
    beyond = (
        "import ctypes; from fence import Fenced\n"
        "with Fenced(100) as fenced: ctypes.string_at(fenced.data_ptr() + {}, 1)"
    )
    ends = [
        subprocess.run(
            [sys.executable, "-c", beyond.format(at)], cwd=Path(__file__).parent, check=False
        ).returncode
        for at in (99, 100, 100 - 2 * mmap.PAGESIZE)
    ]
    assert ends == [0, -signal.SIGSEGV, -signal.SIGSEGV]
