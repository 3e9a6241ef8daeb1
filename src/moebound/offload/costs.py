"""What a token costs: measured speeds, and the model that makes a time of them.

Per MoE layer, with k experts a token of which m have to be brought in: reading f seconds each,
decoding d, computing c; other layers take T. On a CPU, decoding and computing share the cores.

    one after the other   T + m (f + d) + k c
    overlapped            T + max(m f, m d + k c)      the least that overlapping can reach

(The physical model of offloading, with a decoder that has no processor of its own.) Raw weights are
read in S / B seconds an expert and not decoded; they win where the link is faster than decoding.
T is reading what is no expert's, once a token, and `LAYER_S`. c and that are timed by `timing.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.entries import DiskEntries, DiskEntry
from moebound.offload.meter import Load, clock
from moebound.offload.slots import Slot, SlotKind
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
    """Of one source on this machine. link: bytes/s from its tier, None where nothing is moved.
    decode: weights/s with all cores, None where there is nothing to decode."""

    link: float | None
    decode: float | None
    read_s: float
    decode_s: float

    def mixed(self, other: Speeds, share: float) -> Speeds:
        """Where `share` of the experts is brought in so, and the rest as `other` says."""
        return Speeds(
            other.link,
            self.decode,
            share * self.read_s + (1 - share) * other.read_s,
            share * self.decode_s + (1 - share) * other.decode_s,
        )


def measure_speeds(
    entries: Sequence[DiskEntry],
    delivery: Delivery,
    kinds: Mapping[ExpertKey, SlotKind],
    device: torch.device,
) -> Speeds:
    """Bring in these experts, as many at a time as the delivery does, and time it. The first ones
    are brought in twice: what happens once only is not what is measured. So slots are used again,
    as they are when the model runs: memory that is new costs more than decoding what it holds."""
    workspace, together = delivery.workspace(), delivery.together
    groups = [entries[i : i + together] for i in range(0, len(entries), together)]
    loads, slots = list[Load](), dict[SlotKind, list[Slot]]()
    for group in (groups[0], *groups):
        begin, taken = clock(), Counter[SlotKind]()
        arrivals = list[Arrival]()
        for entry in group:
            kind = kinds[entry.key]
            have = slots.setdefault(kind, [])
            if taken[kind] == len(have):
                have.append(kind.empty(device))
            moved = 0 if entry.key in delivery.on_device else entry.n_bytes
            load = Load(entry.key, moved, entry.n_weights, False, begun=begin)
            arrivals.append(Arrival(entry, have[taken[kind]], load))
            taken[kind] += 1
        delivery.bring(arrivals, workspace)
        loads += [arrival.load.share(len(group)) for arrival in arrivals]
    loads = loads[len(groups[0]) :]
    read = sum(load.read - load.begun for load in loads)
    decode = sum(load.done - load.read for load in loads)
    encoded = any(entry.encoded for entry in entries)
    moved = sum(load.n_bytes for load in loads)
    return Speeds(
        moved / max(read, 1e-9) if moved else None,
        sum(load.n_weights for load in loads) / max(decode, 1e-9) if encoded else None,
        read / len(loads),
        decode / len(loads),
    )


def sample(entries: DiskEntries) -> list[DiskEntry]:
    """A few experts, spread over the model, of those that are ever loaded."""
    return sample_of(entries.asked_for or list(entries))


def sample_of(everything: Sequence[DiskEntry]) -> list[DiskEntry]:
    """The same, of these."""
    size = max(1, sum(entry.n_bytes for entry in everything) // len(everything))
    n = min(len(everything), max(MIN_SAMPLES, min(16, SAMPLE_BYTES // size)))
    return [everything[i * len(everything) // n] for i in range(n)]
