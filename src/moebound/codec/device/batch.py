"""Decode many arrays with one launch: a batch.

    streams = [read_stream(data) for data in envelopes]
    batch = DecodeBatch.of(streams)
    batch.pack(envelopes, staging)                  # or read them from a file to batch.offsets
    compressed.copy_(staging, non_blocking=True)
    launched = batch.launch(compressed, outs)       # asynchronous, on the current stream
    ...
    launched.check()                                # waits; raises if a segment was damaged

What the kernels need to know of it is one block of numbers, 7 to 15 kB for a matrix of an expert of
Moonlight size, that travels to the device with each launch; batches may be kept, and launched again
(`resident.py` has what stays on the device). On the CPU the same runs under triton's interpreter
(TRITON_INTERPRET=1 before triton is imported): that is for tests.

Arrays that no kernel decodes, of codecs other than `bound` and `lossless`, were decoded by
`read_stream` on the host, and `prepare` copies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moebound.codec.arrays import to_torch, torch_dtype, will_be_written
from moebound.codec.base import ArraySpec
from moebound.codec.device import metadata
from moebound.codec.device.jobs import FIELDS, make_jobs
from moebound.codec.device.launch import (
    DEFAULT_SCHEDULE,
    Launched,
    OnDevice,
    PreparedDecode,
    Schedule,
)
from moebound.codec.device.metadata import Metadata
from moebound.codec.device.stream import Stream, read_stream
from moebound.errors import CodecError

if TYPE_CHECKING:
    import torch

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class DecodeBatch:
    """Arrays that are decoded together, and where everything is.

    streams: of each array. offsets: where each envelope begins in the buffer of compressed bytes.
    n_bytes: of that buffer, at least. aligned: whether all segments begin at even offsets; bytes
    are read one by one if not.
    """

    streams: tuple[Stream, ...]
    offsets: tuple[int, ...]
    n_bytes: int
    aligned: bool
    metadata: Metadata

    @classmethod
    def of(
        cls, arrays: Sequence[Stream | Bytes], *, offsets: Sequence[int] | None = None
    ) -> DecodeBatch:
        """A batch of these arrays.

        arrays: envelopes, or what `read_stream` made of them. offsets: where each envelope stands
        in the buffer of compressed bytes, anywhere, also overlapping; one behind the other if None,
        each so that its segments are aligned. Raises as `read_stream`.
        """
        streams = tuple(a if isinstance(a, Stream) else read_stream(a) for a in arrays)
        chosen = _in_a_row(streams) if offsets is None else check_offsets(offsets, len(streams))
        ends = [offset + stream.n_bytes for offset, stream in zip(chosen, streams, strict=True)]
        aligned = all(
            (offset + int(stream.coded.segments[0])) % 2 == 0
            for offset, stream in zip(chosen, streams, strict=True)
            if stream.coded is not None
        )
        numbers = metadata.build(streams)
        return cls(streams, tuple(chosen), max(ends, default=0), aligned, numbers)

    def pack(self, envelopes: Sequence[Bytes], into: torch.Tensor) -> None:
        """Copy envelopes, those of the batch, to their offsets of a CPU tensor of uint8.

        Raises CodecError if one has another size, or they do not fit.
        """
        if into.numel() < self.n_bytes:
            raise CodecError(f"into: expected {self.n_bytes} bytes or more, found {into.numel()}")
        target = into.numpy()
        for stream, offset, data in zip(self.streams, self.offsets, envelopes, strict=True):
            if len(data) != stream.n_bytes:
                raise CodecError(f"expected an envelope of {stream.n_bytes} bytes, not {len(data)}")
            target[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def prepare(
        self,
        compressed: torch.Tensor,
        outs: Sequence[torch.Tensor],
        schedule: Schedule = DEFAULT_SCHEDULE,
    ) -> PreparedDecode:
        """Check the tensors of a launch, copy metadata to the device, allocate what kernels need.

        As `launch`, up to running the kernels.
        """
        import torch

        check_compressed(compressed, self.n_bytes, aligned=self.aligned)
        check_outs([stream.spec for stream in self.streams], outs, compressed)
        jobs = make_jobs(
            self.metadata, range(len(outs)), self.offsets, [out.data_ptr() for out in outs]
        )
        # One copy, from pinned memory: the metadata, and the jobs behind it.
        n, on_gpu = len(self.metadata.block), compressed.device.type == "cuda"
        both = torch.empty(n + jobs.numbers.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        both.numpy()[:n] = self.metadata.block
        both.numpy()[n:].view(np.int64)[:] = jobs.numbers.reshape(-1)
        there = both.to(compressed.device, non_blocking=True)
        for stream, out in zip(self.streams, outs, strict=True):
            if stream.decoded is not None:
                out.view(-1).copy_(to_torch(stream.decoded))
        known = OnDevice(self.metadata, there[:n])
        numbers = there[n:].view(torch.int64).view(-1, FIELDS)
        return PreparedDecode(known, jobs, numbers, compressed, schedule)

    def launch(
        self,
        compressed: torch.Tensor,
        outs: Sequence[torch.Tensor],
        schedule: Schedule = DEFAULT_SCHEDULE,
    ) -> Launched:
        """Decode every array into its tensor of `outs`, asynchronously on the current stream.

        compressed: flat uint8 on the device, with the envelopes at `offsets`. outs: contiguous
        tensors of the arrays' size and dtype on the same device, of any shape; views of a larger
        one are fine, but no two of them overlap, nor one and `compressed`; the device has to be the
        current one. schedule: how the work is cut; it changes no bit.

        The caller keeps both as they are until the stream has run this. What is in outs is good
        once `Launched.check` has found no damage; damaged bytes never make a kernel read or write
        elsewhere. Raises CodecError if a tensor does not fit, BackendUnavailable without triton.
        """
        return self.prepare(compressed, outs, schedule).run()


def check_compressed(compressed: torch.Tensor, n_bytes: int, *, aligned: bool) -> None:
    """Raises CodecError for what cannot hold the bytes of a launch."""
    import torch

    if compressed.dtype != torch.uint8 or compressed.dim() != 1:
        raise CodecError("compressed: expected a flat tensor of uint8")
    if compressed.numel() < n_bytes or not compressed.is_contiguous():
        raise CodecError(
            f"compressed: expected {n_bytes} contiguous bytes or more, found {compressed.numel()}"
        )
    if aligned and compressed.data_ptr() % 2:
        raise CodecError("compressed: expected an even address")


def check_offsets(offsets: Sequence[int], n: int) -> list[int]:
    """Offsets of n envelopes as ints. Raises CodecError for others."""
    found = list(offsets)
    whole = all(isinstance(at, (int, np.integer)) and not isinstance(at, bool) for at in found)
    if len(found) != n or not whole or any(at < 0 for at in found):
        raise CodecError(f"offsets: expected {n}, none below 0; found {found}")
    return [int(at) for at in found]


def check_outs(
    specs: Sequence[ArraySpec], outs: Sequence[torch.Tensor], compressed: torch.Tensor
) -> None:
    """Raises CodecError for tensors that arrays of these specs cannot be decoded into: of another
    size, dtype or device than `compressed`, or over it or one another, where what comes out would
    be a matter of which program is quicker. Tells autograd that the others will be written."""
    device = compressed.device
    if len(outs) != len(specs):
        raise CodecError(f"outs: expected {len(specs)} tensors, found {len(outs)}")
    for i, (spec, out) in enumerate(zip(specs, outs, strict=True)):
        dtype = torch_dtype(spec.dtype)
        found = (out.dtype, out.numel(), out.device)
        if found != (dtype, spec.size, device) or not out.is_contiguous():
            raise CodecError(
                f"outs[{i}]: expected {spec.size} contiguous values of {dtype} on {device}, found "
                f"{tuple(out.shape)} of {out.dtype} on {out.device}"
            )
    named = [("compressed", compressed), *((f"outs[{i}]", out) for i, out in enumerate(outs))]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in named if t.nbytes)
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise CodecError(f"{name} and {other} overlap: expected memory of their own")
    will_be_written(outs)


def decode_to(
    data: Bytes | Sequence[Bytes],
    device: torch.device | str,
    out: Sequence[torch.Tensor] | None = None,
    *,
    max_bytes: int | None = None,
) -> list[torch.Tensor]:
    """The arrays of envelopes, decoded on a device; waits for it.

    data: one envelope, or several. out: tensors to decode into, one each; new ones of the arrays'
    shapes if None. max_bytes: of each array, as of `moebound.decode`. Raises as `read_stream`,
    `DecodeBatch.launch` and `Launched.check`.
    """
    import torch

    envelopes = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
    batch = DecodeBatch.of([read_stream(each, max_bytes=max_bytes) for each in envelopes])
    device = torch.device(device)
    staging = torch.empty(batch.n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    batch.pack(envelopes, staging)
    if out is None:
        out = [
            torch.empty(stream.spec.shape, dtype=torch_dtype(stream.spec.dtype), device=device)
            for stream in batch.streams
        ]
    batch.launch(staging.to(device, non_blocking=True), out).check()
    return list(out)


def _in_a_row(streams: Sequence[Stream]) -> list[int]:
    offsets, at = [], 0
    for stream in streams:
        at = -(-at // 4) * 4 + stream.alignment_offset
        offsets.append(at)
        at += stream.n_bytes
    return offsets
