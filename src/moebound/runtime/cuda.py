"""Delivery to a GPU: compressed bytes cross the bus, weights appear in device memory.

Each loading thread has a stream of its own and a buffer of pinned memory. It reads an expert into
the buffer (or finds it pinned already, in the RAM tier), copies the bytes over, and decodes them
there, by one launch for all matrices of the expert (`codec.device`), straight into the slot; the
stream that computes runs on meanwhile. The thread waits for its own stream before it hands over:
so damage is found before anything is computed with it, and its buffer is free again.

A slot may still be in use by computations that were launched and have not run; what overwrites it
waits for them on the device (`Slot.used`). Without triton, weights are decoded by the CPU into
pinned memory and cross the bus decoded.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass

import torch

from moebound.codec.arrays import torch_dtype
from moebound.codec.device import DecodePlan, plan_decode, read_stream
from moebound.errors import CorruptionError, FormatError
from moebound.runtime.delivery import Delivery
from moebound.runtime.images import Image, Part
from moebound.runtime.meter import Load, clock
from moebound.runtime.slots import Slot, fill, plain_weights
from moebound.runtime.tiers import RamTier, Tier
from moebound.types import ExpertKey


@dataclass(eq=False)
class Workspace:
    """One loading thread's. pinned: bytes to be copied. arriving: the same on the device."""

    stream: torch.cuda.Stream
    pinned: torch.Tensor
    arriving: torch.Tensor


class CudaDelivery(Delivery):
    """largest: bytes of the largest image. decode_on_device: None for where triton is."""

    def __init__(
        self,
        tier: Tier,
        device: torch.device,
        *,
        largest: int,
        cores: int,
        decode_on_device: bool | None = None,
    ) -> None:
        self._tier, self._device, self._largest = tier, device, largest
        self._on_device = (
            importlib.util.find_spec("triton") is not None
            if decode_on_device is None
            else decode_on_device
        )
        self._decoding = threading.BoundedSemaphore(cores)
        self._plans = dict[ExpertKey, DecodePlan]()

    def workspace(self) -> Workspace:
        with torch.cuda.device(self._device):
            return Workspace(
                torch.cuda.Stream(self._device),  # type: ignore[no-untyped-call]
                torch.empty(self._largest, dtype=torch.uint8, pin_memory=True),
                torch.empty(self._largest, dtype=torch.uint8, device=self._device),
            )

    def bring(self, image: Image, slot: Slot, load: Load, workspace: Workspace) -> None:
        data = self._tier.bytes_of(image, workspace.pinned.numpy().data)
        load.read = clock()
        with torch.cuda.device(self._device), torch.cuda.stream(workspace.stream):
            if slot.used is not None:
                workspace.stream.wait_event(slot.used)
            if not image.encoded:
                for part in image.parts:
                    weights = plain_weights(part, data[part.start : part.stop])
                    slot.put(part, weights, non_blocking=True)
            elif self._on_device:
                self._decode(image, slot, data, workspace)
            else:
                self._decode_here(image, slot, data)
            workspace.stream.synchronize()
        load.done = clock()

    def _decode(self, image: Image, slot: Slot, data: memoryview, workspace: Workspace) -> None:
        host = torch.frombuffer(data, dtype=torch.uint8)
        workspace.arriving[: len(host)].copy_(host, non_blocking=True)
        outs, aside = [], list[tuple[Part, torch.Tensor]]()
        for part in image.parts:
            target = slot.whole(part)
            if target is None:
                dtype = torch_dtype(part.dtype)
                target = torch.empty(part.shape, dtype=dtype, device=self._device)
                aside.append((part, target))
            outs.append(target)
        try:
            self._plan(image, data).launch(workspace.arriving, outs).check()
        except FormatError as error:
            raise type(error)(f"{image.spans[0].file}: {error}") from error
        for part, weights in aside:
            slot.put(part, weights)

    def _plan(self, image: Image, data: memoryview) -> DecodePlan:
        """Headers read, checksums checked; once, where bytes are in RAM and stay as they are."""
        known = self._plans.get(image.key)
        if known is not None:
            return known
        streams = [read_stream(data[part.start : part.stop]) for part in image.parts]
        for part, stream in zip(image.parts, streams, strict=True):
            if stream.spec.shape != part.shape or stream.spec.dtype != part.dtype:
                raise CorruptionError(f"tensor {part.name!r}: another shape than certified")
        plan = plan_decode(streams, offsets=[part.start for part in image.parts])
        if isinstance(self._tier, RamTier):
            self._plans[image.key] = plan
        return plan

    def _decode_here(self, image: Image, slot: Slot, data: memoryview) -> None:
        weights = {
            name: torch.empty(shape, dtype=slot.kind.dtype, pin_memory=True)
            for name, shape in slot.kind.shapes
        }
        here = Slot(slot.kind, weights)
        with self._decoding:
            for part in image.parts:
                fill(here, part, data[part.start : part.stop], threads=1)
        for name, values in weights.items():
            slot.weights[name].copy_(values, non_blocking=True)
