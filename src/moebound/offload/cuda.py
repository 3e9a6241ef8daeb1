"""Delivery to a GPU: compressed bytes cross the bus, weights appear in device memory.

Each loading thread has a stream of its own and a buffer of pinned memory. It reads an expert into
the buffer (or finds it pinned already, in the RAM tier, up to TOGETHER experts at a time), copies
the bytes over, and decodes them there, by one launch for all matrices (`codec.device`), straight
into the slots (`decoding.py`); the stream that computes runs on meanwhile. The thread waits for its
own stream before it hands over: so damage is found before anything is computed with it, and its
buffer is free again.

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

from moebound.offload.decoding import DeviceDecoder, room_for
from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.images import Image
from moebound.offload.meter import clock
from moebound.offload.slots import Slot, fill, plain_weights
from moebound.offload.tiers import RamTier, Tier

TOGETHER, TOGETHER_BYTES = 8, 256 << 20
"""Experts decoded by one launch, at most: a layer's misses, for most models; and their images'
bytes, which have room on the device for each thread. The larger experts are, the fewer are enough
to keep it busy."""

MOST_READERS = 8
"""Threads that read from a disk."""


@dataclass(eq=False)
class Workspace:
    """One loading thread's. pinned: bytes to be copied. arriving: the same on the device."""

    stream: torch.cuda.Stream
    pinned: torch.Tensor
    arriving: torch.Tensor


class CudaDelivery(Delivery):
    """largest: bytes of the largest compressed image. decode_on_device: None: where triton is."""

    def __init__(
        self,
        tier: Tier,
        device: torch.device,
        *,
        largest: int,
        cores: int,
        decode_on_device: bool | None = None,
    ) -> None:
        self._tier, self._device = tier, device
        if decode_on_device is None:
            decode_on_device = importlib.util.find_spec("triton") is not None
        held = tier.held() if isinstance(tier, RamTier) else ()
        self._decoder = DeviceDecoder(device, held) if decode_on_device else None
        self.kept_bytes = self._decoder.device_bytes if self._decoder is not None else 0
        self._decoding = threading.BoundedSemaphore(cores)
        # From a disk, threads read side by side; out of RAM one launch for many pays more, and two
        # threads are enough for one to copy while the other decodes.
        in_ram = isinstance(tier, RamTier)
        if decode_on_device and in_ram:
            self.together = min(TOGETHER, max(1, TOGETHER_BYTES // max(largest, 1)))
        self.threads = 2 if in_ram else min(cores + 2, MOST_READERS)
        self._arriving_bytes = room_for(self.together, largest) if decode_on_device else 0
        self.buffer_bytes = tier.buffer_bytes + self._arriving_bytes

    def workspace(self) -> Workspace:
        with torch.cuda.device(self._device):
            return Workspace(
                torch.cuda.Stream(self._device),  # type: ignore[no-untyped-call]
                torch.empty(self._tier.buffer_bytes, dtype=torch.uint8, pin_memory=True),
                torch.empty(self._arriving_bytes, dtype=torch.uint8, device=self._device),
            )

    def bytes_of(self, image: Image, workspace: Workspace) -> memoryview:
        return self._tier.bytes_of(image, workspace.pinned.numpy().data)

    def bring(self, arrivals: Sequence[Arrival], workspace: Workspace) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(workspace.stream):
            coming = list[tuple[Arrival, memoryview]]()
            for arrival in arrivals:
                image, slot = arrival.image, arrival.slot
                data = self.bytes_of(image, workspace)
                arrival.load.read = clock()
                if slot.used is not None:
                    workspace.stream.wait_event(slot.used)
                if not image.encoded:
                    for part in image.parts:
                        weights = plain_weights(part, data[part.start : part.stop])
                        slot.put(part, weights, non_blocking=True)
                elif self._decoder is not None and image.enveloped:
                    coming.append((arrival, data))
                else:
                    self._decode_here(arrival, data)
            if coming and self._decoder is not None:
                self._decoder.decode(coming, workspace.arriving)
            workspace.stream.synchronize()
        done = clock()
        for arrival in arrivals:
            arrival.load.done = done

    def _decode_here(self, arrival: Arrival, data: memoryview) -> None:
        slot = arrival.slot
        weights = {
            name: torch.empty(shape, dtype=slot.kind.dtype, pin_memory=True)
            for name, shape in slot.kind.shapes
        }
        here = Slot(slot.kind, weights)
        with self._decoding:
            for part in arrival.image.parts:
                piece = data[part.start : part.stop]
                fill(here, part, piece, threads=1, shared=arrival.shared)
        for name, values in weights.items():
            slot.weights[name].copy_(values, non_blocking=True)
