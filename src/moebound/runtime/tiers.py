"""Where experts wait while they are not decoded: on disk, or compressed in RAM.

A tier gives an image's bytes. From disk they are read into a buffer of the loading thread's own;
in RAM they are there already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch

from moebound.runtime.images import Image
from moebound.types import ExpertKey

TierName = Literal["disk", "ram"]


class Tier(ABC):
    """The place below the cache. held_bytes: memory it takes for itself."""

    name: ClassVar[TierName]
    held_bytes: int

    @abstractmethod
    def buffer(self) -> memoryview:
        """What one loading thread needs to call `bytes_of` with."""

    @abstractmethod
    def bytes_of(self, image: Image, buffer: memoryview) -> memoryview:
        """The image's bytes, in `buffer` or elsewhere. Raises as `Image.read`."""


class DiskTier(Tier):
    """One read an expert. drop_cache: tell the operating system not to keep what was read."""

    name: ClassVar[TierName] = "disk"

    def __init__(self, images: Iterable[Image], *, drop_cache: bool = False) -> None:
        self.drop_cache = drop_cache
        self.held_bytes = 0
        self._largest = max((image.n_bytes for image in images if image.encoded), default=0)

    def buffer(self) -> memoryview:
        return memoryview(bytearray(self._largest))

    def bytes_of(self, image: Image, buffer: memoryview) -> memoryview:
        view = buffer[: image.n_bytes]
        image.read(view, drop_cache=self.drop_cache)
        return view


class RamTier(Tier):
    """Images in RAM, as they are on disk. Reads them when it is made.

    pinned: in memory that a GPU can read by itself.
    """

    name: ClassVar[TierName] = "ram"

    def __init__(self, images: Iterable[Image], *, pinned: bool = False) -> None:
        self._bytes = dict[ExpertKey, memoryview]()
        for image in images:
            if pinned:
                block = torch.empty(image.n_bytes, dtype=torch.uint8, pin_memory=True)
                data = block.numpy().data
            else:
                data = memoryview(bytearray(image.n_bytes))
            image.read(data, drop_cache=True)
            self._bytes[image.key] = data
        self.held_bytes = sum(map(len, self._bytes.values()))

    def buffer(self) -> memoryview:
        return memoryview(b"")

    def bytes_of(self, image: Image, buffer: memoryview) -> memoryview:
        return self._bytes[image.key]
