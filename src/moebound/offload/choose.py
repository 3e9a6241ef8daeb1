"""Which tier, which source, how much for the cache: from measured speeds, before anything runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moebound.cache import Catalog
from moebound.checkpoint import top_k_of
from moebound.errors import CacheError
from moebound.model.code_linear import bytes_in_codes
from moebound.offload.budget import available_memory, parse_budget
from moebound.offload.codes import SlotsName
from moebound.offload.costs import (
    Costs,
    Speeds,
    measure_speeds,
    sample,
    sample_of,
)
from moebound.offload.delivery import CpuDelivery, Delivery
from moebound.offload.device_tier import DeviceTier, candidates
from moebound.offload.entries import DiskEntries, DiskEntry
from moebound.offload.slots import SlotKind
from moebound.offload.split import cache_room, split_device
from moebound.offload.tiers import DiskTier, RamTier, Tier, TierName
from moebound.offload.timing import (
    LAYER_S,
    Between,
    linear_layers,
    measure_turns,
    read_weights,
)
from moebound.types import ExpertKey

FALLBACK_MARGIN = 0.02
"""Another load path than the first is taken where it is predicted to be so much faster."""

NO_LIMIT = 1 << 62

FREE_SHARE = 0.7
"""Of the free memory, what experts get where no budget is given."""


@dataclass(frozen=True)
class LoadPath:
    """One way to run: a source of experts, the tier they wait in, and what slots hold. kinds: of
    the slots of every expert.

    Bytes: cache for decoded experts, held for those in RAM or on the device as they are on disk.
    hit_ratio: what is expected, the share of experts that fit. plan: of tier "device". seconds: a
    token, overlapped.
    """

    name: str
    entries: DiskEntries
    tier: TierName
    cache_bytes: int
    held_bytes: int
    hit_ratio: float
    speeds: Speeds
    costs: Costs
    slots: SlotsName
    kinds: Mapping[ExpertKey, SlotKind]
    plan: DevicePlan | None = None

    @property
    def title(self) -> str:
        slots = "" if self.slots == "values" else f", {self.slots}"
        return f"{self.name}, {self.tier}{slots}"

    @property
    def seconds(self) -> float:
        return self.costs.overlapped_s(self.hit_ratio)


def open_tier(
    name: TierName, entries: Iterable[DiskEntry], device: torch.device, *, drop_cache: bool
) -> Tier:
    """Where these experts wait. Reads them now, if that is RAM."""
    if name == "ram":
        return RamTier(entries, pinned=device.type == "cuda")
    return DiskTier(entries, drop_cache=drop_cache)


def open_path(
    path: LoadPath, device: torch.device, *, cores: int, drop_cache: bool
) -> tuple[LoadPath, Tier]:
    """Where the experts of a load path wait, and the path with the bytes that they really take."""
    everything = path.entries.everything
    if path.plan is None:
        return path, open_tier(path.tier, everything, device, drop_cache=drop_cache)
    tier = DeviceTier(
        everything,
        candidates(path.entries.asked_for),
        device,
        limit=path.plan.limit_bytes,
        beside=path.plan.beside_bytes,
        host_bytes=host_bytes(),
        cores=cores,
        drop_cache=drop_cache,
    )
    decoded = sum(kind.n_bytes for kind in path.kinds.values())
    room = min(path.plan.budget_bytes - tier.held_bytes, decoded)
    return replace(path, cache_bytes=room, held_bytes=tier.held_bytes), tier


def open_delivery(
    tier: Tier, entries: DiskEntries, device: torch.device, *, cores: int
) -> Delivery:
    """How experts get from there to the device."""
    held = tier.keys if isinstance(tier, DeviceTier) else frozenset[ExpertKey]()
    if device.type == "cpu" and not isinstance(tier, DeviceTier):
        return CpuDelivery(tier, cores=cores)
    from moebound.offload.cuda import CudaDelivery

    largest = max((e.n_bytes for e in entries if e.encoded and e.key not in held), default=0)
    return CudaDelivery(tier, device, largest=largest, cores=cores)


def choose(
    sources: Mapping[str, DiskEntries],
    kinds: Mapping[ExpertKey, SlotKind],
    model: Any,
    *,
    ways: Mapping[SlotsName, Mapping[ExpertKey, SlotKind]],
    budget: int | str | None,
    tier: TierName | Literal["auto"],
    device: torch.device,
    cores: int,
    drop_cache: bool,
) -> list[LoadPath]:
    """The load paths that fit the budget, the one to take first.

    sources: by name, the one the user named first; it is left only for one that is predicted to be
    faster by FALLBACK_MARGIN. kinds: of slots of values. ways: what slots of a store may hold, with
    the kinds of all experts; what is no store is values. Budgets in per cent are of all experts as
    values, whatever the slots hold. Raises CacheError, with the smallest budget, if none fits, and
    as `top_k_of`.
    """
    decoded = sum(kind.n_bytes for kind in kinds.values())
    free = available_memory(device)
    if budget is None:
        n_bytes = min(decoded, int(free * FREE_SHARE))
    else:
        n_bytes = parse_budget(budget, of=decoded)
    layers, top_k = len({key.layer for key in kinds}), top_k_of(model.config.to_dict())
    on_host = device.type == "cpu"  # where compressed experts and decoded ones share a memory
    fitting, least = list[LoadPath](), list[int]()
    for name, entries in sources.items():
        plain: Mapping[SlotsName, Mapping[ExpertKey, SlotKind]] = {"values": kinds}
        possible = ways if entries.compressed else plain
        probe = sample(entries)
        for at in _tiers(tier, entries, device):
            for slots, of in possible.items():
                working = top_k + 1 + entries.most_shared
                floor = catalog_of(entries, of).smallest_budget(floor=1, working=working)
                held = entries.n_bytes if at == "ram" and on_host else 0
                everything = sum(kind.n_bytes for kind in of.values())
                speeds, plan = None, None
                if at == "device":
                    plan = plan_device(
                        entries, of, device, n_bytes, floor, cores=cores, drop_cache=drop_cache
                    )
                    held, speeds = plan.held_bytes, plan.speeds
                room = cache_room(n_bytes, held, everything, floor)
                least.append(floor + held)
                if room is None:
                    continue
                if at == "device" and held + room > free:
                    if tier == "auto":
                        continue
                    raise CacheError(
                        f"tier 'device': {held} bytes of compressed experts and {room} for decoded "
                        f"ones are to be on {device}, where {free} are free: give a ram_budget of "
                        f"{int(free * FREE_SHARE)} bytes or less, or use tier='ram'"
                    )
                if speeds is None:
                    waiting = open_tier(at, probe, device, drop_cache=drop_cache)
                    delivery = open_delivery(waiting, entries, device, cores=cores)
                    speeds = measure_speeds(probe, delivery, of, device)
                costs = Costs(speeds.read_s, speeds.decode_s, 0.0, 0.0, layers, top_k)
                fitting.append(
                    LoadPath(
                        name,
                        entries,
                        at,
                        room,
                        held,
                        room / everything,
                        speeds,
                        costs,
                        slots,
                        of,
                        plan,
                    )
                )
    if not least:
        paths = ", ".join(str(entries.path) for entries in sources.values())
        raise CacheError(
            f"{paths}: tier 'device': no expert is of codec bound or an exact copy, which are what "
            "a GPU decodes; use tier='ram' or tier='disk'"
        )
    if not fitting:
        raise CacheError(
            f"budget {n_bytes} bytes: too small for {top_k + 1} experts of a layer at work and one "
            f"kept in each of the other {layers - 1} layers"
            + (", beside all experts as they are on disk" if tier == "ram" else "")
            + (", beside one expert as it is on disk" if tier == "device" else "")
            + f"; the smallest budget is {min(least)} bytes "
            f"({100 * min(least) / decoded:.1f} % of all experts)"
        )
    fitting = _with_turns(fitting, model, device, n_bytes)
    best = fitting[preferred([found.seconds for found in fitting])]
    return [best, *(other for other in fitting if other is not best)]


def _with_turns(
    paths: Sequence[LoadPath], model: Any, device: torch.device, budget: int
) -> list[LoadPath]:
    """The same, with what computing takes, and what is no expert's."""
    # All weights that are not experts' are read once a token.
    rest, codes = read_weights(model) * model.dtype.itemsize, bytes_in_codes(model)
    between = Between(linear_layers(model), device, model.dtype, all_bytes=rest + codes + budget)
    largest = [max(path.kinds.values(), key=lambda kind: kind.n_weights) for path in paths]
    turns = measure_turns(largest, between)
    rest_s = rest * turns.byte_s + codes * turns.code_byte_s
    return [
        replace(
            path,
            costs=replace(
                path.costs,
                compute_s=turns.compute_s[kind],
                other_s=rest_s / path.costs.n_layers + LAYER_S,
            ),
        )
        for path, kind in zip(paths, largest, strict=True)
    ]


def preferred(seconds: Sequence[float]) -> int:
    """Which of these ways to take: the first, unless another is faster by FALLBACK_MARGIN."""
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return 0 if seconds[best] > seconds[0] * (1 - FALLBACK_MARGIN) else best


@dataclass(frozen=True)
class DevicePlan:
    """What of a source a device is to hold compressed, and how fast experts then come.

    Bytes: budget, of the device, for decoded experts too; limit, what the least cache of those
    leaves of it; held, what is expected to be taken; beside, what of that an expert takes beside
    its own.
    """

    budget_bytes: int
    limit_bytes: int
    held_bytes: int
    beside_bytes: int
    speeds: Speeds


def plan_device(
    entries: DiskEntries,
    kinds: Mapping[ExpertKey, SlotKind],
    device: torch.device,
    budget: int,
    floor: int,
    *,
    cores: int,
    drop_cache: bool,
) -> DevicePlan:
    """As many experts as the budget holds beside `floor`, one at least; the others wait on the
    host."""
    found = candidates(entries.asked_for)
    probe = sample_of(found)
    waiting = DeviceTier(
        probe, probe, device,
        limit=NO_LIMIT, beside=0, host_bytes=0, cores=cores, drop_cache=drop_cache,
    )  # fmt: skip
    delivery = open_delivery(waiting, entries, device, cores=cores)
    speeds, beside = measure_speeds(probe, delivery, kinds, device), waiting.most_beside
    split = split_device(
        found,
        asked_for=len(entries.asked_for),
        all_bytes=entries.n_bytes,
        limit=budget - floor,
        beside=beside,
        host_bytes=host_bytes(),
    )
    if split.share < 1:
        some = sample(entries)
        delivery = open_delivery(
            open_tier(split.rest, some, device, drop_cache=drop_cache), entries, device, cores=cores
        )
        speeds = speeds.mixed(measure_speeds(some, delivery, kinds, device), split.share)
    return DevicePlan(budget, budget - floor, split.held_bytes, beside, speeds)


def host_bytes() -> int:
    """What experts may take of the host's memory that are not on the device."""
    return int(available_memory(torch.device("cpu")) * FREE_SHARE)


def _tiers(
    tier: TierName | Literal["auto"], entries: DiskEntries, device: torch.device
) -> tuple[TierName, ...]:
    """Those to try for a source."""
    if tier == "disk" or tier == "ram":
        return (tier,)
    holds = bool(candidates(entries.asked_for))
    if tier == "device":
        return (tier,) if holds else ()
    usable = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return ("disk", "ram", "device") if usable and holds else ("disk", "ram")


def catalog_of(entries: DiskEntries, kinds: Mapping[ExpertKey, SlotKind]) -> Catalog:
    """What each expert and shared part takes in the cache, and what is moved to bring it in."""
    found = sorted(entries.everything, key=lambda entry: entry.key)
    return Catalog(
        tuple(entry.key for entry in found),
        tuple(
            max(1, entry.shared.record.held_bytes) if entry.shared else kinds[entry.key].n_bytes
            for entry in found
        ),
        tuple(entry.n_bytes for entry in found),
    )
