"""Copies to the device, alone and with decoding behind them, over the experts of a layer.

What a miss costs: raw bfloat16 over the link, or fewer bytes over the link and the decoder. Host
memory is pinned. Decoding runs on a second stream, a group of experts behind the copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from moebound.bench.gpu.cases import EXPERT_WEIGHTS, EncodedExpert
from moebound.bench.gpu.throughput import time_on_device, time_on_host
from moebound.bench.timing import Timing
from moebound.codec.device import DecodeBatch, Launched, read_stream


@dataclass(frozen=True)
class TransferRow:
    """One way to bring n_experts to the device as bfloat16, or a part of it.

    n_bytes: that travel. total: host wall clock, from the first call until the device is done.
    """

    what: str
    kind: str
    rate: float
    segment_weights: int
    n_experts: int
    group: int
    n_bytes: int
    total: Timing

    @property
    def gb_per_s(self) -> float:
        return self.n_bytes / self.total.p50_s / 1e9

    @property
    def bf16_gb_per_s(self) -> float:
        """As if raw bfloat16 had travelled."""
        return 2 * self.n_experts * EXPERT_WEIGHTS / self.total.p50_s / 1e9

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gb_per_s": self.gb_per_s, "bf16_gb_per_s": self.bf16_gb_per_s}


def device_copy_gb_per_s(n_bytes: int = 1 << 30) -> float:
    """GB copied a second from device memory to device memory; each is read and written."""
    import torch

    source = torch.ones(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return n_bytes / time_on_device(lambda: target.copy_(source)).p50_s / 1e9


def time_transfer(
    coded: EncodedExpert, n_experts: int, groups: tuple[int, ...]
) -> list[TransferRow]:
    """Raw copies, compressed copies alone, and compressed copies with decoding, checked first.

    groups: experts that one launch decodes.
    """
    import torch

    n_raw = n_experts * EXPERT_WEIGHTS
    raw = torch.empty(n_raw, dtype=torch.bfloat16, pin_memory=True)
    outs = torch.empty(n_raw, dtype=torch.bfloat16, device="cuda")

    def row(what: str, group: int, n_bytes: int, job: Callable[[], object]) -> TransferRow:
        names = (what, coded.kind, coded.rate, coded.segment_weights, n_experts, group)
        return TransferRow(*names, n_bytes, time_on_host(job))

    rows = [row("raw copy", n_experts, 2 * n_raw, lambda: outs.copy_(raw, non_blocking=True))]
    for group in groups:
        pipeline = Pipeline(coded, n_experts, group, outs)
        pipeline.check()
        n_bytes = pipeline.n_bytes
        if group == groups[0]:
            rows.append(row("compressed copy", group, n_bytes, pipeline.copy))
            rows.append(row("copy, then decode", group, n_bytes, pipeline.in_turn))
        rows.append(row("copy with decode", group, n_bytes, pipeline.overlapped))
    return rows


class Pipeline:
    """Experts in pinned memory, copied on one stream and decoded on another, group by group."""

    def __init__(self, coded: EncodedExpert, n_experts: int, group: int, outs: Any) -> None:
        import torch

        streams = [read_stream(data) for data in coded.data]
        self.copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.main = torch.cuda.current_stream()
        self.outs, self.slots, self.batches, self.staged, self.landed = outs, [], [], [], []
        for first in range(0, n_experts, group):
            n = min(group, n_experts - first)
            batch = DecodeBatch.of(streams * n)
            staged = torch.empty(batch.n_bytes, dtype=torch.uint8, pin_memory=True)
            batch.pack(list(coded.data) * n, staged)
            part = outs[first * EXPERT_WEIGHTS : (first + n) * EXPERT_WEIGHTS]
            self.slots.append(torch.split(part, [stream.spec.size for stream in batch.streams]))
            self.batches.append(batch)
            self.staged.append(staged)
            self.landed.append(torch.empty(batch.n_bytes, dtype=torch.uint8, device="cuda"))
        self.n_bytes = sum(batch.n_bytes + len(batch.metadata.block) for batch in self.batches)
        self.coded = coded

    def copy(self) -> None:
        for staged, landed in zip(self.staged, self.landed, strict=True):
            landed.copy_(staged, non_blocking=True)

    def in_turn(self) -> list[Launched]:
        """All copies, then all decoding, on one stream."""
        self.copy()
        jobs = zip(self.batches, self.landed, self.slots, strict=True)
        return [batch.launch(landed, slots) for batch, landed, slots in jobs]

    def overlapped(self) -> list[Launched]:
        """A group is decoded while the next is copied."""
        import torch

        self.copies.wait_stream(self.main)
        launched = []
        jobs = zip(self.batches, self.staged, self.landed, self.slots, strict=True)
        for batch, staged, landed, slots in jobs:
            with torch.cuda.stream(self.copies):
                ready = batch.prepare(landed, slots)
                landed.copy_(staged, non_blocking=True)
                arrived = self.copies.record_event()
            self.main.wait_event(arrived)
            launched.append(ready.run())
        return launched

    def check(self) -> None:
        """Raises if what arrives is damaged, or differs between copies of the same expert."""
        import torch

        self.outs.fill_(7.0)
        for launched in self.overlapped():
            launched.check()
        experts = self.outs.view(-1, EXPERT_WEIGHTS)
        if not torch.equal(experts, experts[:1].expand_as(experts)):
            raise RuntimeError("copies of one expert decoded to different values")
