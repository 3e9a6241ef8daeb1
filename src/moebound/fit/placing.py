"""What of a model lies where on a machine with a GPU, and what a token takes.

In the GPU's memory are all weights that are no routed expert's, ROOM, buffers for what arrives, and
the budget: decoded experts, and in tier "device" compressed ones. Others wait compressed in pinned
memory of the host, or on its disk. Memory is counted by the code that divides it at load
(`offload/split.py`, `offload/cuda.py`). Times are `offload.costs.Costs`, by the rows of `gpu.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moebound.codec import thread_count
from moebound.fit.estimate import ROOM, Estimate
from moebound.fit.experts import Experts, as_it_is
from moebound.fit.gpu import Gpu
from moebound.fit.running import DISK
from moebound.fit.shape import Shape
from moebound.offload.choose import FREE_SHARE, preferred
from moebound.offload.costs import Costs, Speeds
from moebound.offload.cuda import Buffers
from moebound.offload.split import DeviceSplit, Sized, cache_room, split_device
from moebound.offload.tiers import TierName
from moebound.offload.timing import LAYER_S

TIERS: tuple[TierName, ...] = ("disk", "ram", "device")
"""As `moebound.load` tries them."""


@dataclass(frozen=True)
class Host:
    """The machine around a GPU. ram: bytes there are, 0 where nobody says. disk: bytes a second.
    cores: threads that load and decode."""

    ram: int = 0
    disk: float = DISK
    cores: int = 0

    @property
    def pinned(self) -> int:
        """Bytes that experts may take of the RAM, as at load."""
        return max(0, int((self.ram - ROOM) * FREE_SHARE))

    @property
    def threads(self) -> int:
        return self.cores or thread_count()


@dataclass(frozen=True)
class Placed:
    """One rate (None: experts as they are, or a store's own bytes) and one tier.

    Bytes on the device, of device_bytes: other_bytes, of weights that are no expert's; room_bytes,
    for the program, activations and a short text's cache; buffer_bytes, for what arrives, and heads
    of what waits in RAM; compressed_bytes, experts with headers and tables; cache_bytes, decoded
    experts. budget_bytes: the last two, for --ram-budget. floor_bytes: the least that the device
    may have. decoded, compressed: the share of experts that lie there so. rest, rest_bytes: where
    the others wait. seconds: a token. Where it does not fit: no seconds, and nothing lies there.
    """

    rate: float | None
    stored: bool
    tier: TierName
    device_bytes: int
    other_bytes: int
    room_bytes: int
    buffer_bytes: int
    compressed_bytes: int
    cache_bytes: int
    floor_bytes: int
    decoded: float
    compressed: float
    rest: TierName
    rest_bytes: int
    seconds: float | None

    @property
    def name(self) -> str:
        if self.stored:
            return "as stored"
        return "as it is" if self.rate is None else f"rate {self.rate:g}"

    @property
    def budget_bytes(self) -> int:
        return self.compressed_bytes + self.cache_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"budget_bytes": self.budget_bytes}


@dataclass(frozen=True)
class _Way:
    """Experts in one tier, before it is known what fits."""

    experts: Experts
    tier: TierName
    host: Host

    def buffer_bytes(self, rest: TierName, n_rest: int) -> int:
        """On the device, of what comes from the host."""
        known = self.experts.device
        buffers = Buffers.of(
            in_ram=rest == "ram",
            held=self.tier == "device",
            decodes=known is not None,
            largest=self.experts.largest if n_rest else 0,
            cores=self.host.threads,
        )
        heads = known.headers * n_rest if known is not None and rest == "ram" else 0
        return buffers.threads * buffers.arriving_bytes + heads

    def split(self, budget: int, floor: int) -> DeviceSplit[Sized]:
        """Of tier "device"."""
        known = self.experts.device
        assert known is not None  # as `_tiers` has it
        return split_device(
            known.experts,
            asked_for=self.experts.n_asked,
            all_bytes=self.experts.all_bytes,
            limit=budget - floor,
            beside=known.beside,
            host_bytes=self.host.pinned,
        )


def place(
    shape: Shape, sizes: Estimate | None, tier: TierName, gpu: Gpu, device_bytes: int, host: Host
) -> Placed:
    """sizes: at one rate, or a store's; None for experts as they are. tier: one of `tiers_of`."""
    experts = as_it_is(shape) if sizes is None else sizes.experts
    way = _Way(experts, tier, host)
    everything, floor = experts.everything["values"], experts.floor["values"]
    others = shape.plain_bytes * shape.n_other_weights
    free = device_bytes - others - int(ROOM)
    split: DeviceSplit[Sized] | None = None
    rest: TierName = "ram" if tier == "ram" else "disk"
    buffers = 0
    if tier == "device":
        # Buffers depend on what is left to the host, and that on what they leave: none at first.
        while True:
            split = way.split(free - buffers, floor)
            n_rest, rest = experts.n_asked - len(split.held), split.rest
            needed = way.buffer_bytes(rest, n_rest)
            if needed <= buffers:
                break
            buffers = needed
    else:
        buffers = way.buffer_bytes(rest, experts.n_asked)
    held_bytes = 0 if split is None else split.held_bytes
    room = cache_room(free - buffers, held_bytes, everything, floor)
    least = others + int(ROOM) + floor + _least_beside(way, rest)
    rest_bytes = experts.all_bytes if split is None else split.rest_bytes
    share = 0.0 if split is None else split.share
    seconds, decoded = None, 0.0
    if room is not None:
        decoded = room / everything
        speeds = _speeds(shape, sizes, way, gpu, decoded, rest, share)
        other_s = shape.plain_bytes * shape.n_read / (gpu.memory * gpu.speed) / shape.layers
        costs = Costs(
            speeds.read_s,
            speeds.decode_s,
            gpu.compute_s(everything // experts.n_asked),
            other_s + LAYER_S,
            shape.layers,
            shape.top_k,
        )
        seconds = costs.overlapped_s(decoded)
    fits = room is not None
    return Placed(
        None if sizes is None else sizes.rate,
        sizes is not None and sizes.rate is None,
        tier,
        device_bytes,
        others,
        int(ROOM),
        buffers,
        held_bytes if fits else 0,
        room or 0,
        least,
        decoded,
        share if fits else 0.0,
        rest,
        rest_bytes if fits else experts.all_bytes,
        seconds,
    )


def _least_beside(way: _Way, rest: TierName) -> int:
    """The least beside the smallest cache: buffers, and in tier "device" one compressed expert."""
    experts = way.experts
    if way.tier != "device":
        return way.buffer_bytes(rest, experts.n_asked)
    one = way.split(0, 0)
    return one.held_bytes + way.buffer_bytes(one.rest, experts.n_asked - len(one.held))


def _speeds(
    shape: Shape,
    sizes: Estimate | None,
    way: _Way,
    gpu: Gpu,
    decoded: float,
    rest: TierName,
    share: float,
) -> Speeds:
    """As `choose` would have measured them: over the bus and decoding count as decoding."""
    missing = shape.top_k * (1 - decoded)
    if missing == 0:
        return Speeds(None, None, 0.0, 0.0)
    # Of the layers that miss anything, how many they miss.
    together = missing / (1 - decoded**shape.top_k)
    experts, known = way.experts, way.experts.device
    n_bytes, weights = experts.mean_bytes, shape.expert_size
    read_s = n_bytes / way.host.disk if rest == "disk" else 0.0
    if sizes is None:
        return Speeds(None, None, read_s, gpu.over_s(n_bytes))
    if known is None:  # the host decodes
        over = gpu.over_s(shape.plain_bytes * weights)
        return Speeds(None, None, read_s, sizes.decode_s + over)
    segment = known.segment_weights
    if rest == "disk":  # each by itself, its heads read anew
        decode_s = gpu.host_s(n_bytes) + gpu.miss_s(1, weights, segment)
    else:
        decode_s = gpu.miss_s(together, weights, segment)
    there = Speeds(None, None, read_s, gpu.over_s(n_bytes) + decode_s)
    here = Speeds(None, None, 0.0, gpu.miss_s(together, weights, segment))
    return here.mixed(there, share)


def tiers_of(shape: Shape, sizes: Estimate | None, host: Host) -> tuple[TierName, ...]:
    """Where experts can wait: in pinned memory if it holds all of them, and on the device if it
    decodes them."""
    experts = as_it_is(shape) if sizes is None else sizes.experts
    can = {
        "disk": True,
        "ram": experts.all_bytes <= host.pinned,
        "device": experts.device is not None,
    }
    return tuple(tier for tier in TIERS if can[tier])


def place_all(
    shape: Shape, estimates: Sequence[Estimate], gpu: Gpu, device_bytes: int, host: Host
) -> list[list[Placed]]:
    """As it is, then at each rate: every tier that is possible, the one that `tier="auto"` takes
    first, and those that do not fit last."""
    found = list[list[Placed]]()
    for sizes in (None, *estimates):
        ways = [
            place(shape, sizes, tier, gpu, device_bytes, host)
            for tier in tiers_of(shape, sizes, host)
        ]
        fitting = [way for way in ways if way.seconds is not None]
        first = fitting[preferred([way.seconds or 0.0 for way in fitting])] if fitting else None
        found.append(sorted(ways, key=lambda way: (way is not first, way.seconds or math.inf)))
    return found
