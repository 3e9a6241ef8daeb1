"""How an expert gets from its tier into a slot: the last stations of its way, for each device.

A delivery is what a loading thread does with an expert for which there is room. `CpuDelivery` reads
and decodes into the slot's memory; `cuda.py` has the one for GPUs.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebound.methods import FindPart
from moebound.offload.entries import DiskEntry
from moebound.offload.meter import Load, clock
from moebound.offload.slots import Slot, fill, read_into_slot
from moebound.offload.tiers import DiskTier, Tier
from moebound.types import ExpertKey


@dataclass(frozen=True, slots=True)
class Arrival:
    """An expert on its way: where its bytes are, the memory it goes into, what it took. shared:
    where parts that it shares with others come from; None for the store itself."""

    entry: DiskEntry
    slot: Slot
    load: Load
    shared: FindPart | None = None


class Delivery(ABC):
    """One object serves all threads of a loader; each brings a workspace of its own.

    together: so many experts a thread brings at a time, at most. threads: so many serve it best.
    buffer_bytes: what a workspace takes. kept_bytes: what it keeps beside them. on_device: experts
    whose bytes are there already, and need not be moved.
    """

    together: int = 1
    kept_bytes: int = 0
    on_device: frozenset[ExpertKey] = frozenset()
    threads: int
    buffer_bytes: int

    @abstractmethod
    def workspace(self) -> Any:
        """What one thread needs, made once for it."""

    @abstractmethod
    def bytes_of(self, entry: DiskEntry, workspace: Any) -> memoryview:
        """An entry's bytes, in memory of the host; until the workspace is used again."""

    @abstractmethod
    def bring(self, arrivals: Sequence[Arrival], workspace: Any) -> None:
        """Put the weights of these experts, at most `together`, into their slots, and the times
        into their loads. On return they are there.

        Raises what reading and decoding raise; of all of them, then, nothing may be used.
        """


class CpuDelivery(Delivery):
    """cores: so many threads decode at a time, and one alone uses all of them."""

    def __init__(self, tier: Tier, *, cores: int) -> None:
        self._tier, self._cores = tier, cores
        # One more than can decode, so that one reads meanwhile, and one to make room ahead.
        self.threads = cores + 2
        self.buffer_bytes = tier.buffer_bytes
        self._decoding = threading.BoundedSemaphore(cores)
        self._under_way = 0
        self._lock = threading.Lock()

    def workspace(self) -> memoryview:
        return self._tier.buffer()

    def bytes_of(self, entry: DiskEntry, workspace: memoryview) -> memoryview:
        return self._tier.bytes_of(entry, workspace)

    def bring(self, arrivals: Sequence[Arrival], workspace: memoryview) -> None:
        for arrival in arrivals:
            self._bring(arrival, workspace)

    def _bring(self, arrival: Arrival, workspace: memoryview) -> None:
        entry, slot, load = arrival.entry, arrival.slot, arrival.load
        with self._lock:
            self._under_way += 1
        try:
            tier = self._tier
            if not entry.encoded and isinstance(tier, DiskTier) and tier.into_slots:
                tier.check(entry, memoryview(b""))  # what is not encoded is read for that itself
                read_into_slot(slot, entry, drop_cache=tier.drop_cache)
                load.read = load.done = clock()
            else:
                self._decode(arrival, workspace)
        finally:
            with self._lock:
                self._under_way -= 1

    def _decode(self, arrival: Arrival, workspace: memoryview) -> None:
        entry, slot, load = arrival.entry, arrival.slot, arrival.load
        data = self._tier.bytes_of(entry, workspace)
        load.read = clock()
        with self._decoding:
            threads = max(1, self._cores // self._under_way)
            slot.begin()
            for part in entry.matrices:
                piece = data[part.start : part.stop]
                fill(slot, part, piece, threads=threads, shared=arrival.shared)
        load.done = clock()
