"""Where experts wait while they are not decoded: on disk, or compressed in RAM.

A tier gives an image's bytes. From disk they are read into a buffer of the loading thread's own;
in RAM they are there already.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

import torch

from moebound.errors import CheckpointError, CorruptionError
from moebound.offload.images import Image
from moebound.types import ExpertKey

TierName = Literal["disk", "ram"]

PAGE = 4096
"""What reads around the cache begin and end on: a multiple of every disk's block."""


class Tier(ABC):
    """The place below the cache. held_bytes: memory it takes. buffer_bytes: that of a buffer."""

    name: ClassVar[TierName]
    held_bytes: int
    buffer_bytes: int

    @abstractmethod
    def buffer(self) -> memoryview:
        """What one loading thread needs to call `bytes_of` with."""

    @abstractmethod
    def bytes_of(self, image: Image, buffer: memoryview) -> memoryview:
        """The image's bytes, in `buffer` or elsewhere. Raises as `Image.read`."""


class DiskTier(Tier):
    """One read an expert. drop_cache: do not have the operating system keep what was read; where
    the file system can, reads go around its cache altogether (O_DIRECT), which also saves a copy.
    """

    name: ClassVar[TierName] = "disk"

    def __init__(self, images: Iterable[Image], *, drop_cache: bool = False) -> None:
        self.drop_cache = drop_cache
        self.held_bytes = 0
        largest = max((image.n_bytes for image in images), default=0)
        # Of whole pages, and two more, for reads that begin and end on a page.
        self.buffer_bytes = -(-largest // PAGE) * PAGE + 2 * PAGE
        self._direct = DirectFiles() if drop_cache and DirectFiles.possible else None

    def buffer(self) -> memoryview:
        return memoryview(mmap.mmap(-1, self.buffer_bytes))

    def bytes_of(self, image: Image, buffer: memoryview) -> memoryview:
        if self._direct is not None:
            found = self._direct.read(image, buffer)
            if found is not None:
                return found
        view = buffer[: image.n_bytes]
        image.read(view, drop_cache=self.drop_cache)
        return view

    @property
    def into_slots(self) -> bool:
        """Whether experts that are not compressed are best read where they belong, without
        `bytes_of`."""
        return self._direct is None


class DirectFiles:
    """Files read around the operating system's cache. Thread-safe."""

    possible: ClassVar[bool] = hasattr(os, "O_DIRECT")

    def __init__(self) -> None:
        self._open: dict[Path, int | None] = {}
        self._lock = threading.Lock()

    def read(self, image: Image, buffer: memoryview) -> memoryview | None:
        """The image's bytes, somewhere in the page-aligned `buffer`; None where this cannot be
        done: several stretches of bytes, or a file system that refuses. Raises CheckpointError and
        CorruptionError as `Image.read`."""
        stretch = image.stretch
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
    """Images in RAM, as they are on disk. Reads them when it is made.

    pinned: in memory that a GPU can read by itself.
    """

    name: ClassVar[TierName] = "ram"

    def __init__(self, images: Iterable[Image], *, pinned: bool = False) -> None:
        self._bytes = dict[ExpertKey, memoryview]()
        self._images = list(images)
        for image in self._images:
            if pinned:
                block = torch.empty(image.n_bytes, dtype=torch.uint8, pin_memory=True)
                data = block.numpy().data
            else:
                data = memoryview(bytearray(image.n_bytes))
            image.read(data, drop_cache=True)
            self._bytes[image.key] = data
        self.held_bytes = sum(map(len, self._bytes.values()))
        self.buffer_bytes = 0

    def held(self) -> Iterator[tuple[Image, memoryview]]:
        """All images, with their bytes."""
        return ((image, self._bytes[image.key]) for image in self._images)

    def buffer(self) -> memoryview:
        return memoryview(b"")

    def bytes_of(self, image: Image, buffer: memoryview) -> memoryview:
        return self._bytes[image.key]
