"""What a token costs: measured speeds, and the model that makes a time of them.

Per MoE layer, with k experts a token of which m have to be brought in: reading f seconds each,
decoding d, computing c; other layers take T. On a CPU, decoding and computing share the cores.

    one after the other   T + m (f + d) + k c
    overlapped            T + max(m f, m d + k c)      the least that overlapping can reach

(The physical model of offloading, with a decoder that has no processor of its own.) Raw weights are
read in S / B seconds an expert and not decoded; they win where the link is faster than decoding.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moebound.runtime.images import Image, Images
from moebound.runtime.slots import Kind, Slot, fill, read_into_slot
from moebound.runtime.tiers import Tier
from moebound.types import ExpertKey

SAMPLE_BYTES = 96 << 20
"""Read and decoded at most, to measure."""

MIN_SAMPLES = 2


@dataclass(frozen=True)
class Costs:
    """Seconds: read_s and decode_s an expert, compute_s an expert and token, other_s a layer for
    all that is not its experts. n_layers with experts, top_k of them a token."""

    read_s: float
    decode_s: float
    compute_s: float
    other_s: float
    n_layers: int
    top_k: int

    def overlapped_s(self, hit_ratio: float) -> float:
        """Seconds a token at best."""
        misses = self.top_k * (1 - hit_ratio)
        busy = misses * self.decode_s + self.top_k * self.compute_s
        return self.n_layers * (self.other_s + max(misses * self.read_s, busy))

    def serial_s(self, hit_ratio: float) -> float:
        """Seconds a token with nothing overlapped."""
        misses = self.top_k * (1 - hit_ratio)
        per_layer = misses * (self.read_s + self.decode_s) + self.top_k * self.compute_s
        return self.n_layers * (self.other_s + per_layer)


@dataclass(frozen=True)
class Speeds:
    """Of one source on this machine. link: bytes/s from its tier. decode: weights/s with all
    cores, None where there is nothing to decode."""

    link: float
    decode: float | None
    read_s: float
    decode_s: float

    def from_ram(self) -> Speeds:
        """The same where nothing has to be read."""
        return Speeds(float("inf"), self.decode, 0.0, self.decode_s)


def measure_speeds(
    images: Images, tier: Tier, kinds: Mapping[ExpertKey, Kind], *, threads: int
) -> Speeds:
    """Bring in a few experts, spread over the model, and time it."""
    sample = _sample(images)
    buffer = tier.buffer()
    read = decode = 0.0
    for image in sample:
        slot = _slot(kinds[image.key])
        begin = time.perf_counter()
        if image.encoded:
            data = tier.bytes_of(image, buffer)
            middle = time.perf_counter()
            for part in image.parts:
                fill(slot, part, data[part.start : part.stop], threads=threads)
        else:
            read_into_slot(slot, image)
            middle = time.perf_counter()
        end = time.perf_counter()
        read, decode = read + middle - begin, decode + end - middle
    n_bytes = sum(image.n_bytes for image in sample)
    n_weights = sum(image.n_weights for image in sample)
    encoded = any(image.encoded for image in sample)
    return Speeds(
        n_bytes / max(read, 1e-9),
        n_weights / max(decode, 1e-9) if encoded else None,
        read / len(sample),
        decode / len(sample) if encoded else 0.0,
    )


def measure_compute(kind: Kind, *, repeats: int = 5) -> float:
    """Seconds for the products of one expert and one token."""
    slot = _slot(kind)
    for weight in slot.weights.values():
        weight.zero_()
    first = slot.first.t() if kind.transposed else slot.first
    down = slot.down.t() if kind.transposed else slot.down
    x = torch.zeros((1, first.shape[1]), dtype=kind.dtype)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        inner = torch.nn.functional.linear(x, first)
        torch.nn.functional.linear(inner[:, : down.shape[1]], down)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def _sample(images: Images) -> list[Image]:
    everything = list(images)
    size = max(1, images.n_bytes // len(everything))
    n = min(len(everything), max(MIN_SAMPLES, min(16, SAMPLE_BYTES // size)))
    return [everything[i * len(everything) // n] for i in range(n)]


def _slot(kind: Kind) -> Slot:
    return Slot(kind, {name: torch.empty(shape, dtype=kind.dtype) for name, shape in kind.shapes})
