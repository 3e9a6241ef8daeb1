"""Kernels alone, timed with the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from moebound.bench.gpu.cases import EXPERT_WEIGHTS, EncodedExpert
from moebound.bench.timing import Timing
from moebound.codec import envelope, to_torch
from moebound.codec.device import DecodeBatch, Resident, Schedule, read_stream
from moebound.codec.device.metadata import SEGMENTS, TABLES
from moebound.errors import MoeboundError

if TYPE_CHECKING:
    import torch

LEAST_REPEATS, MOST_REPEATS = 5, 50
SECONDS = 0.1
"""Of repeats, for one thing that is timed."""

_HEAD_START = 8_000_000
"""Cycles that the device idles first, so that no launch is waited for."""


def time_on_device(job: Callable[[], object], *, seconds: float = SECONDS) -> Timing:
    """Time what a job enqueues on the current stream, by events around each call.

    The device first sleeps for a moment, so that all calls are enqueued behind one another and the
    host's part does not count. The first call is not counted.
    """
    import torch

    def once(n: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        marks[0].record()
        for mark in marks[1:]:
            job()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    job()
    trial = max(once(2)[-1], 1e-6)
    return Timing.of(once(int(np.clip(seconds / trial, LEAST_REPEATS, MOST_REPEATS))))


@dataclass(frozen=True)
class DecodeRow:
    """Decoding n_experts from bytes on the device to bfloat16 on the device.

    decode: the kernel that decodes segments. expand: the one that expands tables, before it.
    aligned: whether words stand at even addresses.
    """

    kind: str
    rate: float
    segment_weights: int
    n_experts: int
    n_segments: int
    n_tables: int
    schedule: Schedule
    aligned: bool
    bits_per_weight: float
    metadata_bytes: int
    expand: Timing
    decode: Timing

    @property
    def n_weights(self) -> int:
        return self.n_experts * EXPERT_WEIGHTS

    @property
    def gweights_per_s(self) -> float:
        return self.n_weights / (self.decode.p50_s + self.expand.p50_s) / 1e9

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "gweights_per_s": self.gweights_per_s,
            "out_gb_per_s": 2 * self.gweights_per_s,
        }


@dataclass(frozen=True)
class Placed:
    """So many copies of an expert, each with bytes of its own on the device, and where to."""

    batch: DecodeBatch
    compressed: torch.Tensor
    outs: tuple[torch.Tensor, ...]


def placed(coded: EncodedExpert, n_experts: int, *, aligned: bool = True) -> Placed:
    """Weights go into one tensor."""
    import torch

    streams = [read_stream(data) for data in coded.data] * n_experts
    batch = DecodeBatch.of(streams)
    if not aligned:
        batch = DecodeBatch.of(streams, offsets=[offset + 1 for offset in batch.offsets])
    staging = torch.empty(batch.n_bytes, dtype=torch.uint8)
    batch.pack(list(coded.data) * n_experts, staging)
    outs = torch.empty(n_experts * EXPERT_WEIGHTS, dtype=torch.bfloat16, device="cuda")
    slots = torch.split(outs, [stream.spec.size for stream in streams])
    return Placed(batch, staging.cuda(), tuple(slots))


def time_decode(
    coded: EncodedExpert, n_experts: int, schedules: Sequence[Schedule], *, aligned: bool = True
) -> list[DecodeRow]:
    """Decode once with every schedule and check, then time."""
    there = placed(coded, n_experts, aligned=aligned)
    rows = []
    for schedule in schedules:
        ready = there.batch.prepare(there.compressed, there.outs, schedule)
        ready.run().check()
        jobs = ready.jobs
        rows.append(
            DecodeRow(
                coded.kind,
                coded.rate,
                coded.segment_weights,
                n_experts,
                int(ready.known.metadata.facts[:, SEGMENTS].sum()),
                int(ready.known.metadata.facts[:, TABLES].sum()),
                schedule,
                jobs.aligned,
                coded.bits_per_weight,
                len(ready.known.block) + jobs.numbers.nbytes,
                time_on_device(ready.expand, seconds=SECONDS / 4),
                time_on_device(ready.decode),
            )
        )
    return rows


@dataclass(frozen=True)
class HostRow:
    """What the host does for a launch, while the device is busy with something else.

    read: parse the envelopes, checksums included. plan: the metadata. launch: tensors checked,
    metadata on its way, kernels enqueued. resident: the same where metadata is on the device.
    """

    kind: str
    n_experts: int
    read: Timing
    plan: Timing
    launch: Timing
    resident: Timing

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def time_host(coded: EncodedExpert, n_experts: int) -> HostRow:
    """Time the host's part of decoding so many experts."""
    import torch

    there = placed(coded, n_experts)
    batch, arrays = there.batch, range(len(there.outs))
    resident = Resident(batch.streams, "cuda")

    def seconds(job: Callable[[], object]) -> Timing:
        spent = []
        for _ in range(20):
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START // 4)  # type: ignore[no-untyped-call]
            start = time.perf_counter()
            job()
            spent.append(time.perf_counter() - start)
        return Timing.of(spent[3:])

    return HostRow(
        coded.kind,
        n_experts,
        seconds(lambda: [read_stream(data) for data in list(coded.data) * n_experts]),
        seconds(lambda: DecodeBatch.of(batch.streams)),
        seconds(lambda: batch.launch(there.compressed, there.outs)),
        seconds(lambda: resident.launch(arrays, batch.offsets, there.compressed, there.outs)),
    )


@dataclass(frozen=True)
class EncodeRow:
    """Encoding one matrix that is on the device.

    total: host wall clock, from the tensor to the bytes in host memory. code: the kernel that codes
    segments.
    """

    kind: str
    rate: float
    segment_weights: int
    n_weights: int
    total: Timing
    code: Timing

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "total_gweights_per_s": self.n_weights / self.total.p50_s / 1e9,
            "code_gweights_per_s": self.n_weights / self.code.p50_s / 1e9,
        }


def time_encode(coded: EncodedExpert) -> EncodeRow:
    """Encode one matrix and compare with the CPU's bytes, then time.

    Raises MoeboundError if they differ.
    """
    import torch

    from moebound.codec.device.encode import Encoder, encode_on

    tensor = to_torch(coded.matrices[0]).cuda()
    spec = envelope.parse(coded.data[0]).spec

    def encode() -> bytes:
        return encode_on(tensor, spec.abs_bound, segment_weights=coded.segment_weights)

    want, found = envelope.parse(coded.data[0]), envelope.parse(encode())
    if want.payload != found.payload:
        raise MoeboundError(f"{coded.kind}, rate {coded.rate:g}: not the CPU's bytes")
    encoder = Encoder(tensor.view(torch.int16).view(-1), spec, coded.segment_weights)
    encoder.choose()
    return EncodeRow(
        coded.kind,
        coded.rate,
        coded.segment_weights,
        spec.size,
        time_on_host(encode),
        time_on_device(encoder.code),
    )


def time_on_host(job: Callable[[], object], *, repeats: int = 15) -> Timing:
    """Wall clock of a job and of all that the device has to do for it. Two calls do not count."""
    import torch

    seconds = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds[2:])
