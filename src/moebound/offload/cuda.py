"""Delivery to a GPU: compressed bytes cross the bus, weights appear in device memory.

Each loading thread has a stream of its own and a buffer of pinned memory. It reads an expert into
the buffer (or finds it pinned already, in the RAM tier, up to TOGETHER experts at a time), copies
the bytes over, and decodes them there, by one launch for all matrices (`codec.device`), straight
into the slots (`decoding.py`); the stream that computes runs on meanwhile. The thread waits for its
own stream before it hands over: so damage is found before anything is computed with it, and its
buffer is free again.

Experts that wait on the device itself (`device_tier.py`) are decoded by a launch of their own,
while the others that come with them are read.

A slot may still be in use by computations that were launched and have not run; what overwrites it
waits for them on the device (`Slot.used`). Without triton, weights are decoded by the CPU into
pinned memory and cross the bus decoded.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moebound.offload.decoding import DeviceDecoder, Pending, on_device, room_for
from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.device_tier import DeviceTier
from moebound.offload.entries import DiskEntry
from moebound.offload.meter import clock
from moebound.offload.slots import Slot, fill, plain_weights
from moebound.offload.tiers import RamTier, Tier

TOGETHER, TOGETHER_BYTES = 8, 256 << 20
"""Experts decoded by one launch, at most: a layer's misses, for most models; and their entries'
bytes, which have room on the device for each thread. The larger experts are, the fewer are enough
to keep it busy."""

MOST_READERS = 8
"""Threads that read from a disk."""


@dataclass(frozen=True)
class Buffers:
    """together: experts that a thread brings at a time. at_once: of those from the host, what its
    buffer holds. threads: that load. arriving_bytes: on the device, for each thread."""

    together: int
    at_once: int
    threads: int
    arriving_bytes: int

    @classmethod
    def of(cls, *, in_ram: bool, held: bool, decodes: bool, largest: int, cores: int) -> Buffers:
        """in_ram: those on the host are in pinned memory, not on disk. held: some are compressed on
        the device. decodes: the device decodes. largest: bytes of an expert that comes from the
        host, at most."""
        # From a disk, threads read side by side; out of RAM one launch for many pays more, and two
        # threads are enough for one to copy while the other decodes.
        together = 1
        if decodes and in_ram:
            together = min(TOGETHER, max(1, TOGETHER_BYTES // max(largest, 1)))
        elif held:
            together = TOGETHER
        at_once = together if in_ram else 1
        threads = 2 if in_ram else min(cores + 2, MOST_READERS)
        return cls(together, at_once, threads, room_for(at_once, largest) if decodes else 0)


@dataclass(eq=False)
class Workspace:
    """One loading thread's. pinned: bytes to be copied. arriving: the same on the device. stream:
    None on a CPU, which stands for a GPU under triton's interpreter."""

    stream: torch.cuda.Stream | None
    pinned: torch.Tensor
    arriving: torch.Tensor


class CudaDelivery(Delivery):
    """largest: bytes of the largest compressed entry. decode_on_device: None: where triton is."""

    def __init__(
        self,
        tier: Tier,
        device: torch.device,
        *,
        largest: int,
        cores: int,
        decode_on_device: bool | None = None,
    ) -> None:
        self._device = device
        self._held = tier if isinstance(tier, DeviceTier) else None
        self._tier = tier.rest if isinstance(tier, DeviceTier) else tier
        if self._held is not None:
            decode_on_device, self.on_device = True, self._held.keys
        elif decode_on_device is None:
            decode_on_device = importlib.util.find_spec("triton") is not None
        in_ram = isinstance(self._tier, RamTier)
        held = self._tier.held() if isinstance(self._tier, RamTier) else ()
        self._decoder = DeviceDecoder(device, held) if decode_on_device else None
        self.kept_bytes = self._decoder.device_bytes if self._decoder is not None else 0
        self._decoding = threading.BoundedSemaphore(cores)
        buffers = Buffers.of(
            in_ram=in_ram,
            held=self._held is not None,
            decodes=decode_on_device,
            largest=largest,
            cores=cores,
        )
        self.together, self._at_once = buffers.together, buffers.at_once
        self.threads, self._arriving_bytes = buffers.threads, buffers.arriving_bytes
        self.buffer_bytes = self._tier.buffer_bytes + self._arriving_bytes

    def workspace(self) -> Workspace:
        on_gpu = self._device.type == "cuda"
        with on_device(self._device):
            return Workspace(
                torch.cuda.Stream(self._device) if on_gpu else None,  # type: ignore[no-untyped-call]
                torch.empty(self._tier.buffer_bytes, dtype=torch.uint8, pin_memory=on_gpu),
                torch.empty(self._arriving_bytes, dtype=torch.uint8, device=self._device),
            )

    def bytes_of(self, entry: DiskEntry, workspace: Workspace) -> memoryview:
        return self._tier.bytes_of(entry, workspace.pinned.numpy().data)

    def bring(self, arrivals: Sequence[Arrival], workspace: Workspace) -> None:
        held = [arrival for arrival in arrivals if arrival.entry.key in self.on_device]
        others = [arrival for arrival in arrivals if arrival.entry.key not in self.on_device]
        with on_device(self._device, workspace.stream):
            for arrival in arrivals:
                if arrival.slot.used is not None and workspace.stream is not None:
                    workspace.stream.wait_event(arrival.slot.used)
            pending: Pending | None = None
            if held and self._held is not None:
                pending = self._held.launch(held)
                now = clock()
                for arrival in held:
                    arrival.load.read = now
            try:
                # Each has the buffer to itself, where bytes are read into one.
                for at in range(0, len(others), self._at_once):
                    self._from_host(others[at : at + self._at_once], workspace)
            finally:
                if pending is not None:  # whatever happens, nothing may still write into slots
                    pending.finish()
                if workspace.stream is not None:
                    workspace.stream.synchronize()
        done = clock()
        for arrival in arrivals:
            arrival.load.done = done

    def _from_host(self, arrivals: Sequence[Arrival], workspace: Workspace) -> None:
        coming = list[tuple[Arrival, memoryview]]()
        for arrival in arrivals:
            entry, slot = arrival.entry, arrival.slot
            data = self.bytes_of(entry, workspace)
            arrival.load.read = clock()
            if not entry.encoded:
                for part in entry.matrices:
                    weights = plain_weights(part, data[part.start : part.stop])
                    slot.put(part, weights, non_blocking=True)
            elif self._decoder is not None and entry.enveloped:
                coming.append((arrival, data))
            else:
                self._decode_here(arrival, data)
        if coming and self._decoder is not None:
            self._decoder.decode(coming, workspace.arriving)
        if workspace.stream is not None:
            workspace.stream.synchronize()  # the buffer is free again

    def _decode_here(self, arrival: Arrival, data: memoryview) -> None:
        slot = arrival.slot
        weights = {
            name: torch.empty(shape, dtype=slot.kind.dtype, pin_memory=self._device.type == "cuda")
            for name, shape in slot.kind.shapes
        }
        here = Slot(slot.kind, weights)
        with self._decoding:
            for part in arrival.entry.matrices:
                piece = data[part.start : part.stop]
                fill(here, part, piece, threads=1, shared=arrival.shared)
        for name, values in weights.items():
            slot.weights[name].copy_(values, non_blocking=True)
