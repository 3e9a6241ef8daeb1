"""Where experts wait while they are not decoded: on disk, or compressed in RAM.

A tier gives an entry's bytes. From disk they are read into a buffer of the loading thread's own;
in RAM they are there already. `device_tier.py` has the one in a GPU's memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from moebound.errors import CheckpointError, CorruptionError
from moebound.offload.entries import DiskEntry
from moebound.types import ExpertKey

TierName = Literal["disk", "ram", "device"]

PAGE = 4096
"""What reads around the cache begin and end on: a multiple of every disk's block."""

HUGE_PAGE = 2 << 20
"""What large buffers are made of, where the system has such pages: a read around the cache pins
every page that it writes to, and 3.3 MB then take 0.14 ms of CPU time instead of 0.33."""


class Tier(ABC):
    """The place below the cache. held_bytes: memory it takes. buffer_bytes: that of a buffer.

    An entry of a store is checked against its certificates when it is first used, not at every
    load of it.
    """

    name: ClassVar[TierName]
    held_bytes: int
    buffer_bytes: int

    def __init__(self) -> None:
        self._checked = set[ExpertKey]()

    def check(self, entry: DiskEntry, data: memoryview) -> None:
        """Raises CorruptionError, naming file and tensor, for bytes that are not the certified
        ones. Two threads may check one entry at a time, and find the same."""
        if entry.key not in self._checked:
            entry.check(data)
            self._checked.add(entry.key)

    @abstractmethod
    def buffer(self) -> memoryview:
        """What one loading thread needs to call `bytes_of` with."""

    @abstractmethod
    def bytes_of(self, entry: DiskEntry, buffer: memoryview) -> memoryview:
        """The entry's bytes, in `buffer` or elsewhere. Raises as `DiskEntry.read` and `check`."""


class DiskTier(Tier):
    """One read an expert. drop_cache: do not have the operating system keep what was read; where
    the file system can, reads go around its cache altogether (O_DIRECT), which also saves a copy.
    """

    name: ClassVar[TierName] = "disk"

    def __init__(self, entries: Iterable[DiskEntry], *, drop_cache: bool = False) -> None:
        super().__init__()
        self.drop_cache = drop_cache
        self.held_bytes = 0
        largest = max((entry.n_bytes for entry in entries), default=0)
        # Of whole pages, and two more, for reads that begin and end on a page.
        self.buffer_bytes = -(-largest // PAGE) * PAGE + 2 * PAGE
        self._direct = DirectFiles() if drop_cache and DirectFiles.possible else None
        if self._direct is not None and self.buffer_bytes >= HUGE_PAGE:
            self.buffer_bytes = -(-self.buffer_bytes // HUGE_PAGE) * HUGE_PAGE

    def buffer(self) -> memoryview:
        if self._direct is not None and self.buffer_bytes >= HUGE_PAGE:
            return huge_pages(self.buffer_bytes)
        return memoryview(mmap.mmap(-1, self.buffer_bytes))

    def bytes_of(self, entry: DiskEntry, buffer: memoryview) -> memoryview:
        if self._direct is not None:
            found = self._direct.read(entry, buffer)
            if found is not None:
                self.check(entry, found)
                return found
        view = buffer[: entry.n_bytes]
        entry.read(view, drop_cache=self.drop_cache)
        self.check(entry, view)
        return view

    @property
    def into_slots(self) -> bool:
        """Whether experts that are not compressed are best read where they belong, without
        `bytes_of`."""
        return self._direct is None


def huge_pages(n_bytes: int) -> memoryview:
    """Memory of whole huge pages, which begins on one; of ordinary pages where there are none."""
    block = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -np.frombuffer(block, np.uint8).ctypes.data % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system built without them
            block.madvise(mmap.MADV_HUGEPAGE, begin, n_bytes)
    return memoryview(block)[begin : begin + n_bytes]


class DirectFiles:
    """Files read around the operating system's cache. Thread-safe."""

    possible: ClassVar[bool] = hasattr(os, "O_DIRECT")

    def __init__(self) -> None:
        self._open: dict[Path, int | None] = {}
        self._lock = threading.Lock()

    def read(self, entry: DiskEntry, buffer: memoryview) -> memoryview | None:
        """The entry's bytes, somewhere in the page-aligned `buffer`; None where this cannot be
        done: several stretches of bytes, or a file system that refuses. Raises CheckpointError and
        CorruptionError as `DiskEntry.read`."""
        stretch = entry.stretch
        if stretch is None:
            return None
        file, offset, n_bytes = stretch
        handle = self._handle(file)
        if handle is None:
            return None
        begin = offset // PAGE * PAGE
        wanted, done = offset + n_bytes - begin, 0
        whole = -(-wanted // PAGE) * PAGE
        try:
            while done < wanted:
                n = os.preadv(handle, [buffer[done:whole]], begin + done)
                if n == 0:
                    raise CorruptionError(f"{file}: ends before byte {offset + n_bytes}")
                done += n
                if done < wanted and done % PAGE:
                    return None  # a short read off the page: the ordinary way goes on
        except OSError as error:
            if error.errno == errno.EINVAL:
                return None
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
        return buffer[offset - begin : offset - begin + n_bytes]

    def _handle(self, file: Path) -> int | None:
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
                except FileNotFoundError as error:
                    raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
                except OSError:
                    self._open[file] = None
            return self._open[file]

    def __del__(self) -> None:
        for handle in self._open.values():
            if handle is not None:
                os.close(handle)


class RamTier(Tier):
    """DiskEntries in RAM, as they are on disk. Reads them when it is made.

    pinned: in memory that a GPU can read by itself.
    """

    name: ClassVar[TierName] = "ram"

    def __init__(self, entries: Iterable[DiskEntry], *, pinned: bool = False) -> None:
        super().__init__()
        self._bytes = dict[ExpertKey, memoryview]()
        self._entries = list(entries)
        for entry in self._entries:
            if pinned:
                block = torch.empty(entry.n_bytes, dtype=torch.uint8, pin_memory=True)
                data = block.numpy().data
            else:
                data = memoryview(bytearray(entry.n_bytes))
            entry.read(data, drop_cache=True)
            self._bytes[entry.key] = data
        self.held_bytes = sum(map(len, self._bytes.values()))
        self.buffer_bytes = 0

    def held(self) -> Iterator[tuple[DiskEntry, memoryview]]:
        """All entries, with their bytes."""
        return ((entry, self._bytes[entry.key]) for entry in self._entries)

    def buffer(self) -> memoryview:
        return memoryview(b"")

    def bytes_of(self, entry: DiskEntry, buffer: memoryview) -> memoryview:
        data = self._bytes[entry.key]
        self.check(entry, data)
        return data
