"""Decode compressed experts on a device, straight into slots: all that come together by one launch.

Where entries stay in RAM, their headers are read once and what the kernels need of them stays on
the device; a miss then costs a copy, a few numbers and a launch. What comes from a disk is read
anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from moebound.codec.arrays import torch_dtype
from moebound.codec.device import DecodeBatch, Launched, Resident, Schedule, Stream, read_stream
from moebound.codec.device.launch import DEFAULT_SCHEDULE
from moebound.errors import CorruptionError, FormatError
from moebound.offload.delivery import Arrival
from moebound.offload.entries import DiskEntry, DiskMatrix
from moebound.offload.slots import Slot
from moebound.types import ExpertKey

ALIGNMENT = 16
"""DiskEntries begin at multiples of this, in the bytes of a launch."""

Coming = Sequence[tuple[Arrival, memoryview]]
"""Experts with their entries' bytes."""


def room_for(n: int, largest: int) -> int:
    """Bytes that n entries of at most `largest` bytes take, one behind the other."""
    return n * -(-largest // ALIGNMENT) * ALIGNMENT


class DeviceDecoder:
    """held: entries whose bytes stay as they are. Reads their headers and checks their checksums.

    Raises FormatError or CorruptionError, with the file in front, for those that are damaged.
    """

    def __init__(
        self,
        device: torch.device,
        held: Iterable[tuple[DiskEntry, memoryview]] = (),
        *,
        schedule: Schedule = DEFAULT_SCHEDULE,
    ) -> None:
        self._schedule = schedule
        self._first = dict[ExpertKey, int]()  # the number of an entry's first array
        streams = list[Stream]()
        for entry, data in held:
            found = _read(entry, data) if entry.encoded and entry.enveloped else []
            if found and all(stream.coded is not None for stream in found):
                self._first[entry.key] = len(streams)
                streams += found
        self._resident = Resident(streams, device) if streams else None

    @property
    def device_bytes(self) -> int:
        """What is kept on the device."""
        return self._resident.n_bytes if self._resident is not None else 0

    def decode(self, coming: Coming, arriving: torch.Tensor) -> None:
        """Copy the entries' bytes to the device and decode them into the arrivals' slots; waits.

        coming: pinned bytes travel by themselves. arriving: flat uint8 on the slots' device, with
        `room_for` them. Runs on the current stream.
        Raises FormatError or CorruptionError for damaged bytes, with the files in front.
        """
        offsets, outs, at = list[int](), list[torch.Tensor](), 0
        aside = list[tuple[Slot, DiskMatrix, torch.Tensor]]()
        for arrival, data in coming:
            host = torch.frombuffer(data, dtype=torch.uint8)
            arriving[at : at + len(host)].copy_(host, non_blocking=True)
            for part in arrival.entry.matrices:
                target = arrival.slot.whole(part)
                if target is None:
                    dtype = torch_dtype(part.dtype)
                    target = torch.empty(part.shape, dtype=dtype, device=arriving.device)
                    aside.append((arrival.slot, part, target))
                offsets.append(at + part.start)
                outs.append(target)
            at += room_for(1, len(host))
        launched = self._launch(coming, offsets, arriving, outs)
        try:
            launched.check()
        except FormatError as error:
            files = ", ".join(dict.fromkeys(str(a.entry.spans[0].file) for a, _ in coming))
            raise type(error)(f"{files}: {error}") from error
        for slot, part, weights in aside:
            slot.put(part, weights)

    def _launch(
        self,
        coming: Coming,
        offsets: Sequence[int],
        arriving: torch.Tensor,
        outs: Sequence[torch.Tensor],
    ) -> Launched:
        if self._resident is not None and all(a.entry.key in self._first for a, _ in coming):
            arrays = list[int]()
            for arrival, _ in coming:
                first = self._first[arrival.entry.key]
                arrays += range(first, first + len(arrival.entry.matrices))
            return self._resident.launch(arrays, offsets, arriving, outs, self._schedule)
        streams = [stream for a, data in coming for stream in _read(a.entry, data)]
        return DecodeBatch.of(streams, offsets=offsets).launch(arriving, outs, self._schedule)


def _read(entry: DiskEntry, data: memoryview) -> list[Stream]:
    """Parsed and checked, checksums too."""
    try:
        streams = [read_stream(data[part.start : part.stop]) for part in entry.matrices]
    except FormatError as error:
        raise type(error)(f"{entry.spans[0].file}: {error}") from error
    for part, stream in zip(entry.matrices, streams, strict=True):
        if stream.spec.shape != part.shape or stream.spec.dtype != part.dtype:
            raise CorruptionError(
                f"{entry.spans[0].file}: tensor {part.name!r}: another shape than certified"
            )
    return streams
