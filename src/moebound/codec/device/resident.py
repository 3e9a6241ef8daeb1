"""Arrays whose metadata stays on the device: a launch brings nothing but a few numbers an array.

    resident = Resident(streams, "cuda")             # once, for all experts
    launched = resident.launch([4, 5, 17], offsets, compressed, outs)
    launched.check()

For bytes that stay as they are, in host memory say, and are decoded again and again in ever other
company. A matrix of an expert of Moonlight size takes 4 to 8 kB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moebound.codec.checks import whole
from moebound.codec.device import metadata
from moebound.codec.device.batch import check_compressed, check_offsets, check_outs
from moebound.codec.device.jobs import FIELDS, make_jobs
from moebound.codec.device.kept_tables import KeptTables, kept_bytes
from moebound.codec.device.launch import (
    DEFAULT_SCHEDULE,
    Launched,
    OnDevice,
    PreparedDecode,
    Schedule,
)
from moebound.codec.device.stream import Stream
from moebound.errors import CodecError

if TYPE_CHECKING:
    import torch


class Resident:
    """streams: of the arrays, numbered from 0; of codecs that the device decodes. tables: expand
    their tables now and keep them there, too (`kept_tables.py`), where a launch expands those of
    its arrays otherwise; the device has to be the current one for that.

    Raises CodecError for one that the host has decoded, BackendUnavailable without triton where
    tables are to be expanded.
    """

    def __init__(
        self, streams: Sequence[Stream], device: torch.device | str, *, tables: bool = False
    ) -> None:
        import torch

        for i, stream in enumerate(streams):
            if stream.coded is None:
                raise CodecError(f"array {i}: codec {stream.codec!r} is not decoded on a device")
        self._specs = [stream.spec for stream in streams]
        self._sizes = [stream.n_bytes for stream in streams]
        known = metadata.build(streams)
        self._known = OnDevice(known, torch.from_numpy(known.block).to(device))
        self._tables = KeptTables(self._known) if tables else None

    @property
    def n_bytes(self) -> int:
        """What it takes on the device."""
        tables = 0 if self._tables is None else self._tables.n_bytes
        return len(self._known.metadata.block) + tables

    def launch(
        self,
        arrays: Sequence[int],
        offsets: Sequence[int],
        compressed: torch.Tensor,
        outs: Sequence[torch.Tensor],
        schedule: Schedule = DEFAULT_SCHEDULE,
    ) -> Launched:
        """Decode these arrays, asynchronously on the current stream.

        arrays: by number. offsets: where the envelope of each begins in `compressed`: the bytes
        that its stream was read from, which is for the caller to see to; others decode to something
        else or are reported as damage, and make no kernel read or write elsewhere. All else as
        `DecodeBatch.launch`.
        """
        import torch

        # An array's number is an address to the kernels: -1 would be in front of the metadata.
        arrays = [whole(i, "arrays: number", 0, len(self._specs) - 1) for i in arrays]
        offsets = check_offsets(offsets, len(arrays))
        ends = [at + self._sizes[i] for i, at in zip(arrays, offsets, strict=True)]
        check_outs([self._specs[i] for i in arrays], outs, compressed)
        kept = None if self._tables is None else self._tables.of(arrays, schedule)
        tables, first_slots = (None, None) if kept is None else kept
        addresses = [out.data_ptr() for out in outs]
        jobs = make_jobs(self._known.metadata, arrays, offsets, addresses, first_slots)
        check_compressed(compressed, max(ends, default=0), aligned=jobs.aligned)
        numbers = torch.empty(
            (len(jobs), FIELDS), dtype=torch.int64, pin_memory=compressed.device.type == "cuda"
        )
        numbers.numpy()[:] = jobs.numbers
        there = numbers.to(compressed.device, non_blocking=True)
        return PreparedDecode(self._known, jobs, there, compressed, schedule, tables).run()


def resident_bytes(streams: Sequence[Stream], *, tables: bool = True) -> int:
    """What these arrays add to a `Resident`, with tables or without, at most: sections are padded
    once."""
    known = metadata.build(streams)
    kept = kept_bytes(known.facts[:, metadata.SLOTS]) if tables else 0
    return len(known.block) + kept
