"""What is known of a GPU: rows that were measured on one, or on the one that is here.

The rows are of one NVIDIA H200 in a virtual machine (2026-11-26), experts of 8.65 million weights,
at rate 0.3, as real ones are coded (several tables a matrix): `bench/results/gpu.json`, and of
products `offload_gpu-*.json`. Nothing says how another GPU compares; `speed` divides what the
device does, and not what the host or the bus do.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from moebound.codec.device import Resident, read_stream
from moebound.fit.experts import kind_of, segment_of
from moebound.fit.shape import Shape
from moebound.offload.cuda import TOGETHER
from moebound.offload.decoding import on_device, room_for, schedule_for
from moebound.offload.meter import clock
from moebound.offload.timing import Between, measure_turns, synchronize

LINK = 25_000_000_000
"""Bytes a second over PCIe 4 x16, about, where nobody says more."""
H200_LINK = 55_000_000_000
"""Over PCIe 5 x16, of 64 experts raw: gpu.json has 55.4e9."""

_EXPERT = 3 * 2048 * 1408
_COPIED = 64 << 20
_REPEATS = 5
Points = Sequence[tuple[float, float]]
"""Of a curve: (how much, seconds)."""


@dataclass(frozen=True)
class Gpu:
    """name: whose rows these are. link: bytes a second to it. speed: of the device, in shares of
    that one's. decode: kernels, by weights that come together, for each size of segments. launch:
    of the host, by experts. products: of one expert and token, by bytes. memory: bytes a second of
    other weights. parse_s, parse_bytes: heads and checksums of an expert of so many bytes, which
    what comes from a disk needs anew. measured: on the device that is here."""

    name: str
    link: float
    decode: Mapping[int, Points]
    launch: Points
    products: Points
    memory: float
    parse_s: float
    parse_bytes: int
    speed: float = 1.0
    measured: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def compute_s(self, n_bytes: int) -> float:
        """Products of an expert of so many bytes with one token."""
        return _at(self.products, n_bytes) / self.speed

    def miss_s(self, together: float, weights: int, segment: int) -> float:
        """Host's launch and kernels, an expert, where so many come together."""
        launches = math.ceil(together / TOGETHER)
        each = together / launches
        nearest = min(self.decode, key=lambda size: abs(math.log(size / max(1, segment))))
        kernels = _at(self.decode[nearest], each * weights) / self.speed
        return launches * (_at(self.launch, each) + kernels) / together

    def host_s(self, n_bytes: float) -> float:
        """Reading heads and checksums."""
        return self.parse_s * n_bytes / self.parse_bytes

    def over_s(self, n_bytes: float) -> float:
        """Over the bus."""
        return n_bytes / self.link


H200 = Gpu(
    "NVIDIA H200",
    H200_LINK,
    {
        1 << 14: ((_EXPERT, 0.00014534), (6 * _EXPERT, 0.00031011), (64 * _EXPERT, 0.0021735)),
        1 << 18: ((_EXPERT, 0.0014802), (6 * _EXPERT, 0.0018964), (64 * _EXPERT, 0.0041783)),
    },
    ((1, 0.00031655), (6, 0.00034523), (64, 0.00052014)),
    ((2 * _EXPERT, 4.623e-05), (2 * 3 * 4096 * 14336, 0.00011036)),
    2 * 3 * 4096 * 14336 / 0.00011036,
    0.00076908 + 0.00007413,
    3_346_892,
)


def known(*, link: float | None, speed: float = 1.0) -> Gpu:
    """By the rows of an H200, behind a link of so many bytes a second; None for LINK."""
    return replace(H200, link=LINK if link is None else link, speed=speed)


def here() -> torch.device | None:
    """The GPU of this machine that would decode; None without one."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        return torch.device("cuda")
    return None


def measure_gpu(
    shape: Shape, envelopes: Sequence[bytes], device: torch.device, *, link: float | None = None
) -> Gpu:
    """Time it: decoding one expert and TOGETHER of them out of the device's memory, products, and
    the bus, unless that is said. envelopes: of one expert's matrices."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU in a GPU's place"
    streams = [read_stream(data) for data in envelopes]
    parse_s = _least_s(lambda: [read_stream(data) for data in envelopes])
    n_bytes = sum(map(len, envelopes))
    with on_device(device):
        launch, decode = _decoding(shape, streams, envelopes, device)
        between = Between([], device, torch.bfloat16)
        kind = kind_of(shape)
        turns = measure_turns([kind], between)
        products, memory = ((kind.n_bytes, turns.compute_s[kind]),), 1 / turns.byte_s
        pinned = torch.zeros(_COPIED, dtype=torch.uint8, pin_memory=on_gpu)
        there = torch.empty_like(pinned, device=device)

        def copy() -> None:
            there.copy_(pinned, non_blocking=True)
            synchronize(device)

        link = _COPIED / _least_s(copy) if link is None else link
    segments = {segment_of(streams): decode}
    return Gpu(name, link, segments, launch, products, memory, parse_s, n_bytes, measured=True)


def _decoding(
    shape: Shape, streams: Sequence[Any], envelopes: Sequence[bytes], device: torch.device
) -> tuple[Points, Points]:
    """Of the host, and of the kernels after it."""
    resident, schedule = Resident(streams, device, tables=True), schedule_for(device)
    offsets = np.cumsum([0, *(room_for(1, len(data)) for data in envelopes)]).tolist()
    block = torch.zeros(offsets[-1], dtype=torch.uint8)
    for at, data in zip(offsets, envelopes, strict=False):
        block[at : at + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    block = block.to(device)
    launch, decode = list[tuple[float, float]](), list[tuple[float, float]]()
    for n in (1, TOGETHER):
        outs = [
            torch.empty(stream.spec.shape, dtype=torch.bfloat16, device=device)
            for _ in range(n)
            for stream in streams
        ]
        launches = list[float]()

        def bring(
            n: int = n, outs: list[torch.Tensor] = outs, took: list[float] = launches
        ) -> None:
            begin = clock()
            launched = resident.launch(
                list(range(len(streams))) * n, offsets[:-1] * n, block, outs, schedule
            )
            took.append(clock() - begin)
            launched.check()

        whole = _least_s(bring)
        launch.append((n, min(launches[1:])))
        decode.append((n * shape.expert_size, max(1e-9, whole - launch[-1][1])))
    return launch, decode


def _least_s(job: Callable[[], object]) -> float:
    """Of some, the first not counted."""
    times = list[float]()
    for _ in range(1 + _REPEATS):
        begin = clock()
        job()
        times.append(clock() - begin)
    return min(times[1:])


def _at(points: Points, x: float) -> float:
    """Straight between two points; below the first as there, and beyond the last in proportion."""
    last, seconds = points[-1]
    if x > last:
        return seconds * x / last
    return float(np.interp(x, [at for at, _ in points], [s for _, s in points]))
