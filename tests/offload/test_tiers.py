"""Where experts wait: the same bytes from everywhere."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moebound.checkpoint import open_checkpoint
from moebound.errors import CheckpointError, CorruptionError
from moebound.offload.entries import DiskEntries, open_entries
from moebound.offload.tiers import (
    HUGE_PAGE,
    PAGE,
    DirectFiles,
    DiskTier,
    RamTier,
    huge_pages,
)
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny


@pytest.fixture(scope="module", params=["store", "each", "fused"])
def entries(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> DiskEntries:
    """Of a store, and of checkpoints whose experts are one stretch of bytes, or several."""
    folder = tmp_path_factory.mktemp("entries")
    src = make_tiny("mixtral", folder / "src", original_format=request.param != "fused")
    if request.param == "store":
        compress(open_checkpoint(src), folder / "dst", bound=ErrorBound(0.3, "rate"))
        src = folder / "dst"
    return open_entries(src)


def test_the_same_bytes(entries: DiskEntries) -> None:
    kept, direct, ram = DiskTier(entries), DiskTier(entries, drop_cache=True), RamTier(entries)
    buffers = kept.buffer(), direct.buffer()
    for entry in entries:
        expected = bytearray(entry.n_bytes)
        entry.read(memoryview(expected))
        assert kept.bytes_of(entry, buffers[0]) == expected
        assert direct.bytes_of(entry, buffers[1]) == expected
        assert ram.bytes_of(entry, memoryview(b"")) == expected
    assert ram.held_bytes == entries.n_bytes
    assert kept.held_bytes == 0


@pytest.mark.skipif(not DirectFiles.possible, reason="no O_DIRECT on this system")
def test_reads_around_the_cache_or_says_that_it_cannot(entries: DiskEntries) -> None:
    direct, buffer = DirectFiles(), DiskTier(entries).buffer()
    for entry in entries:
        found = direct.read(entry, buffer)
        if found is None:
            assert entry.stretch is None or entry.stretch[0].stat().st_size < PAGE
        else:
            expected = bytearray(entry.n_bytes)
            entry.read(memoryview(expected))
            assert found == expected


@pytest.mark.parametrize("drop_cache", [False, True])
def test_files_that_change(drop_cache: bool, tmp_path: Path) -> None:
    src = make_tiny("mixtral", tmp_path / "src")
    compress(open_checkpoint(src), tmp_path / "dst", bound=ErrorBound(0.3, "rate"))
    entries = open_entries(tmp_path / "dst")
    last = list(entries)[-1]
    tier = DiskTier(entries, drop_cache=drop_cache)
    buffer = tier.buffer()
    file = last.spans[0].file
    with open(file, "r+b") as handle:
        handle.truncate(last.spans[0].offset + 10)
    with pytest.raises(CorruptionError, match="ends"):
        tier.bytes_of(last, buffer)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        DiskTier(entries, drop_cache=drop_cache).bytes_of(last, buffer)


@pytest.mark.parametrize("drop_cache", [False, True])
def test_reads_that_come_short_or_late(
    entries: DiskEntries, drop_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer bytes a call than asked for, on a page and off it, and each call after a while."""
    real, calls = os.preadv, list[int]()

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        time.sleep(0.0005)
        calls.append(len(buffers[0]))
        most = (PAGE, 1000)[len(calls) % 2]
        return real(fd, [buffers[0][:most]], offset)

    expected = [bytearray(entry.n_bytes) for entry in entries]
    for entry, data in zip(entries, expected, strict=True):
        entry.read(memoryview(data))
    monkeypatch.setattr(os, "preadv", short)
    tier = DiskTier(entries, drop_cache=drop_cache)
    buffer = tier.buffer()
    for entry, data in zip(entries, expected, strict=True):
        assert tier.bytes_of(entry, buffer) == data
    assert len(calls) > len(expected)


def test_huge_pages() -> None:
    for n_bytes in (HUGE_PAGE, 2 * HUGE_PAGE):
        memory = huge_pages(n_bytes)
        assert len(memory) == n_bytes
        assert np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE == 0
        memory[0], memory[-1] = 1, 2
        assert memory[1:-1] == bytes(n_bytes - 2)


@pytest.mark.skipif(not DirectFiles.possible, reason="no O_DIRECT on this system")
def test_large_buffers_are_of_huge_pages(entries: DiskEntries) -> None:
    entry = next(iter(entries))
    span = replace(entry.spans[0], n_bytes=HUGE_PAGE + 1)
    large = [replace(entry, spans=(span,))]
    direct, kept = DiskTier(large, drop_cache=True), DiskTier(large)
    assert direct.buffer_bytes == len(direct.buffer()) == 2 * HUGE_PAGE
    assert HUGE_PAGE < kept.buffer_bytes == len(kept.buffer()) < 2 * HUGE_PAGE
