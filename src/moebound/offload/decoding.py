"""Decode compressed experts on a device, straight into slots: all that come together by one launch.

Where entries stay in RAM, their headers are read once and what the kernels need of them stays on
the device; a miss then costs a copy, a few numbers and a launch. What comes from a disk is read
anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

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


Aside = Sequence[tuple[Slot, DiskMatrix, torch.Tensor]]
"""Matrices that are laid out otherwise in their slots, and where they are decoded first."""


@dataclass(frozen=True)
class Pending:
    """Experts that are being decoded on a device, on the stream that was current."""

    launched: Launched
    entries: Sequence[DiskEntry]
    aside: Aside

    def finish(self) -> None:
        """Wait for the kernels; on the same stream. Raises FormatError or CorruptionError for
        damaged bytes, with the files in front."""
        try:
            self.launched.check()
        except FormatError as error:
            files = ", ".join(dict.fromkeys(str(entry.spans[0].file) for entry in self.entries))
            raise type(error)(f"{files}: {error}") from error
        for slot, part, weights in self.aside:
            slot.put(part, weights)


def targets(arrivals: Sequence[Arrival], device: torch.device) -> tuple[list[torch.Tensor], Aside]:
    """Where the matrices of these experts are decoded to, in their order."""
    outs, aside = list[torch.Tensor](), list[tuple[Slot, DiskMatrix, torch.Tensor]]()
    for arrival in arrivals:
        for part in arrival.entry.matrices:
            target = arrival.slot.whole(part)
            if target is None:
                target = torch.empty(part.shape, dtype=torch_dtype(part.dtype), device=device)
                aside.append((arrival.slot, part, target))
            outs.append(target)
    return outs, aside


def on_device(device: torch.device, stream: torch.cuda.Stream | None = None) -> ExitStack:
    """Make it the current one, and the stream too; nothing on a CPU, which stands for a GPU under
    triton's interpreter."""
    found = ExitStack()
    if device.type == "cuda":
        found.enter_context(torch.cuda.device(device))
        if stream is not None:
            found.enter_context(torch.cuda.stream(stream))
    return found


def schedule_for(device: torch.device) -> Schedule:
    """On a GPU one segment a program; the interpreter wants many."""
    return DEFAULT_SCHEDULE if device.type == "cuda" else Schedule(together=32)


class DeviceDecoder:
    """held: entries whose bytes stay as they are. Reads their headers and checks their checksums.

    Raises FormatError or CorruptionError, with the file in front, for those that are damaged.
    """

    def __init__(
        self,
        device: torch.device,
        held: Iterable[tuple[DiskEntry, memoryview]] = (),
    ) -> None:
        self._schedule = schedule_for(device)
        self._first = dict[ExpertKey, int]()  # the number of an entry's first array
        streams = list[Stream]()
        for entry, data in held:
            found = read_streams(entry, data) if entry.encoded and entry.enveloped else []
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
        offsets, at = list[int](), 0
        for arrival, data in coming:
            host = torch.frombuffer(data, dtype=torch.uint8)
            arriving[at : at + len(host)].copy_(host, non_blocking=True)
            offsets += [at + part.start for part in arrival.entry.matrices]
            at += room_for(1, len(host))
        arrivals = [arrival for arrival, _ in coming]
        outs, aside = targets(arrivals, arriving.device)
        launched = self._launch(coming, offsets, arriving, outs)
        Pending(launched, [arrival.entry for arrival in arrivals], aside).finish()

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
        streams = [stream for a, data in coming for stream in read_streams(a.entry, data)]
        return DecodeBatch.of(streams, offsets=offsets).launch(arriving, outs, self._schedule)


def read_streams(entry: DiskEntry, data: memoryview) -> list[Stream]:
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
