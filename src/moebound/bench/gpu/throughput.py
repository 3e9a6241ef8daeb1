"""Kernels alone, timed with the device's own clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moebound.bench.gpu.cases import EXPERT_WEIGHTS, EncodedExpert
from moebound.bench.timing import Timing
from moebound.codec.device import PreparedDecode, plan_decode, read_stream

LEAST_REPEATS, MOST_REPEATS = 5, 50
SECONDS = 0.15
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

    together: segments of a program. ahead: whether a warp loads words a step early.
    decode: the kernel that decodes segments. expand: the one that expands tables, before it.
    """

    kind: str
    rate: float
    segment_weights: int
    n_experts: int
    n_segments: int
    n_tables: int
    together: int
    ahead: bool
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


def prepared(
    coded: EncodedExpert, n_experts: int, *, together: int = 1, ahead: bool = True
) -> PreparedDecode:
    """Decode so many copies of an expert, each from bytes of its own, into one tensor."""
    import torch

    streams = [read_stream(data) for data in coded.data] * n_experts
    plan = plan_decode(streams)
    staging = torch.empty(plan.n_bytes, dtype=torch.uint8)
    plan.pack(list(coded.data) * n_experts, staging)
    outs = torch.empty(n_experts * EXPERT_WEIGHTS, dtype=torch.bfloat16, device="cuda")
    slots = torch.split(outs, [stream.spec.size for stream in streams])
    return plan.prepare(staging.cuda(), slots, together=together, ahead=ahead)


def time_decode(
    coded: EncodedExpert, n_experts: int, *, together: int = 1, ahead: bool = True
) -> DecodeRow:
    """Decode once and check, then time."""
    ready = prepared(coded, n_experts, together=together, ahead=ahead)
    ready.run().check()
    numbers = ready.plan.metadata
    return DecodeRow(
        coded.kind,
        coded.rate,
        coded.segment_weights,
        n_experts,
        len(numbers.owners),
        numbers.n_tables,
        together,
        ahead,
        coded.bits_per_weight,
        len(numbers.block),
        time_on_device(ready.expand, seconds=SECONDS / 4),
        time_on_device(ready.decode),
    )
