"""Decode compressed experts on a device, straight into slots: all that come together by one launch.

Where images stay in RAM, their headers are read once and what the kernels need of them stays on the
device; a miss then costs a copy, a few numbers and a launch. What comes from a disk is read anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from moebound.codec.arrays import torch_dtype
from moebound.codec.device import DecodeBatch, Launched, Resident, Schedule, Stream, read_stream
from moebound.codec.device.launch import DEFAULT_SCHEDULE
from moebound.errors import CorruptionError, FormatError
from moebound.offload.delivery import Arrival
from moebound.offload.images import Image, Part
from moebound.offload.slots import Slot
from moebound.types import ExpertKey

ALIGNMENT = 16
"""Images begin at multiples of this, in the bytes of a launch."""

Coming = Sequence[tuple[Arrival, memoryview]]
"""Experts with their images' bytes."""


def room_for(n: int, largest: int) -> int:
    """Bytes that n images of at most `largest` bytes take, one behind the other."""
    return n * -(-largest // ALIGNMENT) * ALIGNMENT


class DeviceDecoder:
    """held: images whose bytes stay as they are. Reads their headers and checks their checksums.

    Raises FormatError or CorruptionError, with the file in front, for those that are damaged.
    """

    def __init__(
        self,
        device: torch.device,
        held: Iterable[tuple[Image, memoryview]] = (),
        *,
        schedule: Schedule = DEFAULT_SCHEDULE,
    ) -> None:
        self._schedule = schedule
        self._first = dict[ExpertKey, int]()  # the number of an image's first array
        streams = list[Stream]()
        for image, data in held:
            found = _read(image, data) if image.encoded and image.enveloped else []
            if found and all(stream.coded is not None for stream in found):
                self._first[image.key] = len(streams)
                streams += found
        self._resident = Resident(streams, device) if streams else None

    @property
    def device_bytes(self) -> int:
        """What is kept on the device."""
        return self._resident.n_bytes if self._resident is not None else 0

    def decode(self, coming: Coming, arriving: torch.Tensor) -> None:
        """Copy the images' bytes to the device and decode them into the arrivals' slots; waits.

        coming: pinned bytes travel by themselves. arriving: flat uint8 on the slots' device, with
        `room_for` them. Runs on the current stream.
        Raises FormatError or CorruptionError for damaged bytes, with the files in front.
        """
        offsets, outs, at = list[int](), list[torch.Tensor](), 0
        aside = list[tuple[Slot, Part, torch.Tensor]]()
        for arrival, data in coming:
            host = torch.frombuffer(data, dtype=torch.uint8)
            arriving[at : at + len(host)].copy_(host, non_blocking=True)
            for part in arrival.image.parts:
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
            files = ", ".join(dict.fromkeys(str(a.image.spans[0].file) for a, _ in coming))
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
        if self._resident is not None and all(a.image.key in self._first for a, _ in coming):
            arrays = list[int]()
            for arrival, _ in coming:
                first = self._first[arrival.image.key]
                arrays += range(first, first + len(arrival.image.parts))
            return self._resident.launch(arrays, offsets, arriving, outs, self._schedule)
        streams = [stream for a, data in coming for stream in _read(a.image, data)]
        return DecodeBatch.of(streams, offsets=offsets).launch(arriving, outs, self._schedule)


def _read(image: Image, data: memoryview) -> list[Stream]:
    """Parsed and checked, checksums too."""
    try:
        streams = [read_stream(data[part.start : part.stop]) for part in image.parts]
    except FormatError as error:
        raise type(error)(f"{image.spans[0].file}: {error}") from error
    for part, stream in zip(image.parts, streams, strict=True):
        if stream.spec.shape != part.shape or stream.spec.dtype != part.dtype:
            raise CorruptionError(
                f"{image.spans[0].file}: tensor {part.name!r}: another shape than certified"
            )
    return streams
