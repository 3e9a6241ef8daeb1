"""How a model that is not here would run in so much memory, and what a token would take.

The cost model is `offload.costs.Costs`, the one that `moebound.load` chooses by. What it is given
was measured on this machine: decoding a random expert of the model's shape (`estimate`), its
products, and reading memory, as `offload/timing.py` times them at load. Assumed are the disk's
speed, and `LAYER_S`. The hit ratio is the share of experts that fit; texts with locality do better.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from moebound.bench.environment import describe
from moebound.codec import thread_count
from moebound.fit.estimate import ROOM, Estimate
from moebound.fit.experts import Linears, as_it_is, kind_of
from moebound.fit.shape import Shape
from moebound.offload.codes import SlotsName
from moebound.offload.costs import Costs
from moebound.offload.slots import SlotKind
from moebound.offload.split import cache_room
from moebound.offload.timing import LAYER_S, Between, measure_turns

DISK = 1_000_000_000
"""Bytes a second that a disk gives, where nobody says more."""
_REPEATS = 20
Where = Literal["no", "disk", "memory", "decoded"]


@dataclass(frozen=True)
class Machine:
    """What was measured here, for one shape. cpu: its name. compute_s: products of one expert and
    token, by kind of slots. memory: bytes a second. disk: the same, as said."""

    cpu: str | None
    threads: int
    compute_s: dict[SlotsName, float]
    memory: float
    disk: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layer_s": LAYER_S}


@dataclass(frozen=True)
class Running:
    """One rate (None: experts as they are, or a store's own bytes) and one kind of slots.

    where: as `Fits` has it, but of disk and memory the faster. held: share of experts that are
    ready to compute with. floor_bytes: the least memory that a machine may have. seconds: a token;
    None where it does not fit.
    """

    rate: float | None
    slots: SlotsName
    memory: int
    where: Where
    held: float
    floor_bytes: int
    seconds: float | None
    stored: bool = False

    @property
    def name(self) -> str:
        """In a table or a plot."""
        if self.stored:
            return "as stored"
        return "as it is" if self.rate is None else f"rate {self.rate:g}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_machine(shape: Shape, *, disk: float = DISK) -> Machine:
    """Time one expert's products, with each kind of slots, and reading memory."""
    values = kind_of(shape)
    kinds: dict[SlotsName, SlotKind] = {
        "values": values,
        "codes": replace(values, aside_bytes=0),
        "codes4": replace(values, aside_bytes=0, bits=4),
    }
    between = Between([], torch.device("cpu"), values.dtype)
    turns = measure_turns(kinds.values(), between, _REPEATS)
    found = {slots: turns.compute_s[kind] for slots, kind in kinds.items()}
    return Machine(describe()["cpu"], thread_count(), found, 1 / turns.byte_s, disk)


def running(
    shape: Shape, sizes: Estimate | None, slots: SlotsName, machine: Machine, memory: int
) -> Running:
    """How it would run within `memory` bytes of a machine with a CPU.

    sizes: at one rate, or a store's; None for experts as they are.
    """
    experts = as_it_is(shape) if sizes is None else sizes.experts
    everything, least = experts.everything[slots], experts.floor[slots]
    held = Linears() if sizes is None else sizes.linears
    plain = shape.n_other_weights - held.n_weights
    beside = int(ROOM) + shape.plain_bytes * plain + held.n_bytes
    # A weight's product takes as long as an expert's of the same kind: both come from memory.
    read_s = shape.plain_bytes * (shape.n_read - held.n_weights) / machine.memory
    for kind, n in held.weights.items():
        read_s += n * machine.compute_s[kind] / shape.expert_size
    other_s = read_s / shape.layers + LAYER_S
    budget = memory - beside

    def costs(read_s: float) -> Costs:
        decode_s = 0.0 if sizes is None else sizes.decode_of(slots)
        return Costs(read_s, decode_s, machine.compute_s[slots], other_s, shape.layers, shape.top_k)

    def made(where: Where, held: float, seconds: float | None) -> Running:
        rate, stored = (None, False) if sizes is None else (sizes.rate, sizes.rate is None)
        return Running(rate, slots, memory, where, held, beside + least, seconds, stored)

    room = cache_room(budget, 0, everything, least)
    if room is None:
        return made("no", 0.0, None)
    if room == everything:
        return made("decoded", 1.0, costs(0.0).overlapped_s(1.0))
    share = room / everything
    found = made("disk", share, costs(experts.mean_bytes / machine.disk).overlapped_s(share))
    room = cache_room(budget, experts.all_bytes, everything, least)
    if sizes is not None and room is not None:
        share = room / everything
        waiting = made("memory", share, costs(0.0).overlapped_s(share))
        found = min(waiting, found, key=lambda way: way.seconds or math.inf)
    return found


def all_running(
    shape: Shape, estimates: list[Estimate], machine: Machine, memory: int
) -> list[Running]:
    """As it is, then at each rate with each kind of slots that its experts can lie in."""
    found = [running(shape, None, "values", machine, memory)]
    return found + [
        running(shape, sizes, slots, machine, memory)
        for sizes in estimates
        for slots in sizes.experts.everything
    ]
