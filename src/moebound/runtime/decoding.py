"""Decode compressed experts on a device, straight into slots: all that come together by one launch.

The headers are read on the host; where bytes are in RAM and stay as they are, once for each expert,
so that what a miss costs there is a copy and a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moebound.codec.arrays import torch_dtype
from moebound.codec.device import Stream, plan_decode, read_stream
from moebound.errors import CorruptionError, FormatError
from moebound.runtime.delivery import Arrival
from moebound.runtime.images import Image, Part
from moebound.runtime.slots import Slot
from moebound.types import ExpertKey

ALIGNMENT = 16
"""Images begin at multiples of this, in the bytes of a launch."""


def room_for(n: int, largest: int) -> int:
    """Bytes that n images of at most `largest` bytes take, one behind the other."""
    return n * -(-largest // ALIGNMENT) * ALIGNMENT


class DeviceDecoder:
    """keep: whether an image's bytes are always the same, so that its headers are read once."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._streams = dict[ExpertKey, list[Stream]]()

    def decode(self, coming: Sequence[tuple[Arrival, memoryview]], arriving: torch.Tensor) -> None:
        """Copy the images' bytes to the device and decode them into the arrivals' slots; waits.

        coming: with each image's bytes; pinned ones travel by themselves. arriving: flat uint8 on
        the slots' device, with `room_for` them. Runs on the current stream.
        Raises FormatError or CorruptionError for damaged bytes, with the files in front.
        """
        streams, offsets, outs, at = list[Stream](), list[int](), list[torch.Tensor](), 0
        aside = list[tuple[Slot, Part, torch.Tensor]]()
        try:
            for arrival, data in coming:
                host = torch.frombuffer(data, dtype=torch.uint8)
                arriving[at : at + len(host)].copy_(host, non_blocking=True)
                streams += self._read(arrival.image, data)
                for part in arrival.image.parts:
                    target = arrival.slot.whole(part)
                    if target is None:
                        target = torch.empty(
                            part.shape, dtype=torch_dtype(part.dtype), device=arriving.device
                        )
                        aside.append((arrival.slot, part, target))
                    offsets.append(at + part.start)
                    outs.append(target)
                at += room_for(1, len(host))
            plan_decode(streams, offsets=offsets).launch(arriving, outs).check()
        except FormatError as error:
            files = ", ".join(dict.fromkeys(str(a.image.spans[0].file) for a, _ in coming))
            raise type(error)(f"{files}: {error}") from error
        for slot, part, weights in aside:
            slot.put(part, weights)

    def _read(self, image: Image, data: memoryview) -> list[Stream]:
        """Parsed and checked, checksums too."""
        known = self._streams.get(image.key)
        if known is not None:
            return known
        streams = [read_stream(data[part.start : part.stop]) for part in image.parts]
        for part, stream in zip(image.parts, streams, strict=True):
            if stream.spec.shape != part.shape or stream.spec.dtype != part.dtype:
                raise CorruptionError(f"tensor {part.name!r}: another shape than certified")
        if self._keep:
            self._streams[image.key] = streams
        return streams
