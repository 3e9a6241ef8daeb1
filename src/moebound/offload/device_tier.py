"""Experts that wait compressed in the memory of the GPU that computes: a miss crosses no bus.

Their bytes stand in one block of the device's memory, and beside it what the kernels need to know
of all: headers, and the tables, expanded (`codec.device.Resident`). So a miss brings a few numbers
along, and all that come together are decoded by one launch.

What the budget does not hold waits on the host, as without this: in pinned memory if it fits there,
on disk otherwise. So do shared parts, experts that are not compressed, and those of codecs that no
kernel decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import torch

from moebound.codec.bound import BoundCodec
from moebound.codec.device import Resident, Stream
from moebound.codec.device.resident import resident_bytes
from moebound.codec.device.triton_kernels import check_device
from moebound.codec.lossless import LosslessCodec
from moebound.errors import BackendUnavailable, CacheError
from moebound.offload.decoding import (
    Pending,
    on_device,
    read_streams,
    room_for,
    schedule_for,
    targets,
)
from moebound.offload.delivery import Arrival
from moebound.offload.entries import DiskEntry
from moebound.offload.split import first_fitting
from moebound.offload.tiers import DiskTier, RamTier, Tier, TierName
from moebound.types import ExpertKey


class DeviceTier(Tier):
    """entries: of experts and shared parts. candidates: those of them to hold on the device, the
    first ones first, as far as the limit goes.

    limit: bytes of the device for all of this. beside: what an expert is expected to take beside
    its own bytes; what each really takes is counted as it is read, and the limit is kept.
    host_bytes: of pinned memory that the others may take; they stay on disk if they are larger.
    cores: threads that read and check. Each expert on the device is checked against its certificate
    now, since the host does not see it again.

    rest: where the others wait. held_bytes: what this takes on the device. most_beside: the most
    that an expert takes there beside its bytes.
    Raises what reading and checking raise, CacheError where the device has not so much memory.
    """

    name: ClassVar[TierName] = "device"

    def __init__(
        self,
        entries: Iterable[DiskEntry],
        candidates: Sequence[DiskEntry],
        device: torch.device,
        *,
        limit: int,
        beside: int,
        host_bytes: int,
        cores: int,
        drop_cache: bool,
    ) -> None:
        super().__init__()
        wanted = first_fitting(candidates, limit, beside)
        room, at = sum(room_for(1, entry.n_bytes) for entry in wanted), 0
        self._compressed = _memory(room, device)
        self._offsets, self._first = dict[ExpertKey, int](), dict[ExpertKey, int]()
        self._schedule, self.most_beside = schedule_for(device), 0
        streams, left = list[Stream](), limit - room
        for entry, data, found in self._read(wanted, cores):
            beside = resident_bytes(found)
            if beside > left:
                break  # some took more than was expected
            left -= beside
            self.most_beside = max(self.most_beside, beside)
            there = self._compressed[at : at + entry.n_bytes]
            there.copy_(torch.frombuffer(data, dtype=torch.uint8))
            self._offsets[entry.key], self._first[entry.key] = at, len(streams)
            at += room_for(1, entry.n_bytes)
            streams += found
        with on_device(device):
            self._resident = Resident(streams, device, tables=True)
        if not streams:
            self._compressed = _memory(0, device)
        self.held_bytes = room + self._resident.n_bytes if streams else 0
        others = [entry for entry in entries if entry.key not in self._offsets]
        if sum(entry.n_bytes for entry in others) <= host_bytes:
            self.rest: Tier = RamTier(others, pinned=device.type == "cuda")
        else:
            self.rest = DiskTier(others, drop_cache=drop_cache)
        self.buffer_bytes = self.rest.buffer_bytes

    @property
    def keys(self) -> frozenset[ExpertKey]:
        """Experts on the device."""
        return frozenset(self._offsets)

    def buffer(self) -> memoryview:
        return self.rest.buffer()

    def bytes_of(self, entry: DiskEntry, buffer: memoryview) -> memoryview:
        """Of those that wait on the host."""
        return self.rest.bytes_of(entry, buffer)

    def launch(self, arrivals: Sequence[Arrival]) -> Pending:
        """Decode experts that are on the device into their slots, on the current stream."""
        arrays, offsets = list[int](), list[int]()
        for arrival in arrivals:
            key, parts = arrival.entry.key, arrival.entry.matrices
            arrays += range(self._first[key], self._first[key] + len(parts))
            offsets += [self._offsets[key] + part.start for part in parts]
        outs, aside = targets(arrivals, self._compressed.device)
        launched = self._resident.launch(arrays, offsets, self._compressed, outs, self._schedule)
        return Pending(launched, [arrival.entry for arrival in arrivals], aside)

    def _read(
        self, entries: Sequence[DiskEntry], cores: int
    ) -> Iterator[tuple[DiskEntry, bytearray, list[Stream]]]:
        """Their bytes, checked and parsed; a few at a time are in memory."""

        def read(entry: DiskEntry) -> tuple[DiskEntry, bytearray, list[Stream]]:
            data = bytearray(entry.n_bytes)
            entry.read(memoryview(data), drop_cache=True)
            self.check(entry, memoryview(data))
            return entry, data, read_streams(entry, memoryview(data))

        with ThreadPoolExecutor(cores) as threads:
            for at in range(0, len(entries), 2 * cores):
                yield from threads.map(read, entries[at : at + 2 * cores])


def check_tier(device: torch.device) -> None:
    """Raises CacheError for a device that has no memory of its own, BackendUnavailable without
    triton. Under triton's interpreter the CPU stands for a GPU, for tests."""
    try:
        check_device(device)
    except BackendUnavailable:
        if device.type == "cuda":
            raise
        raise CacheError(
            f"tier 'device': experts wait in a GPU's own memory, and device {device.type!r} has "
            "none: use tier='ram', which keeps them compressed in RAM, or device='cuda'"
        ) from None


def candidates(entries: Iterable[DiskEntry]) -> list[DiskEntry]:
    """Those that a device can hold and decode. A few of them are spread over all layers, so that
    layers have their misses from there alike."""
    found = [entry for entry in entries if _decodable(entry)]
    return sorted(found, key=lambda entry: (entry.key.expert, entry.key.layer))


def _decodable(entry: DiskEntry) -> bool:
    if entry.shared is not None or entry.needs:
        return False
    return all(
        part.stored is not None
        and part.stored.target is None
        and part.stored.record.certificate.codec in (BoundCodec.id, LosslessCodec.id)
        and part.size
        for part in entry.matrices
    )


def _memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise CacheError(
            f"tier 'device': {device} has no {n_bytes} bytes free for compressed experts: give a "
            "smaller ram_budget, or use tier='ram'"
        ) from error
