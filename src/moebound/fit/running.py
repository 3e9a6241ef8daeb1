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
from moebound.fit.estimate import PLAIN_BYTES, ROOM, Estimate
from moebound.fit.shape import Shape
from moebound.offload.costs import Costs
from moebound.offload.slots import SlotKind
from moebound.offload.timing import LAYER_S, Between, measure_compute, measure_memory

DISK = 1_000_000_000
"""Bytes a second that a disk gives, where nobody says more."""
SlotsKind = Literal["values", "codes"]
_SLOTS: tuple[SlotsKind, ...] = ("values", "codes")
Where = Literal["no", "disk", "memory", "decoded"]


@dataclass(frozen=True)
class Machine:
    """What was measured here, for one shape. cpu: its name. compute_s: products of one expert and
    token, by kind of slots. memory: bytes a second. disk: the same, as said."""

    cpu: str | None
    threads: int
    compute_s: dict[SlotsKind, float]
    memory: float
    disk: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layer_s": LAYER_S}


@dataclass(frozen=True)
class Running:
    """One rate (None: experts as they are, in bfloat16) and one kind of slots.

    where: as `Fits` has it, but of disk and memory the faster. held: share of experts that are
    ready to compute with. floor_bytes: the least memory that a machine may have. seconds: a token;
    None where it does not fit.
    """

    rate: float | None
    slots: SlotsKind
    memory: int
    where: Where
    held: float
    floor_bytes: int
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_machine(shape: Shape, *, disk: float = DISK) -> Machine:
    """Time one expert's products, with weights and with codes, and reading memory."""
    *into, down = shape.expert
    rows = sum(sides[0] for sides in into)
    kind = SlotKind(
        (("first", (rows, into[0][1])), ("down_proj", down)),
        torch.bfloat16, gated=False, transposed=False, interleaved=False,
    )  # fmt: skip
    between = Between([], torch.device("cpu"), kind.dtype)
    found: dict[SlotsKind, float] = {
        "values": measure_compute(kind, between),
        "codes": measure_compute(replace(kind, aside_bytes=0), between),
    }
    return Machine(
        describe()["cpu"], thread_count(), found, 1 / measure_memory(between), disk
    )


def running(
    shape: Shape, sizes: Estimate | None, slots: SlotsKind, machine: Machine, memory: int
) -> Running:
    """How it would run within `memory` bytes of a machine with a CPU.

    sizes: at one rate; None for experts as they are, in bfloat16.
    """
    n_experts = shape.layers * shape.n_experts
    held_as = shape.expert_size * (PLAIN_BYTES if slots == "values" else 1)
    everything = held_as * n_experts
    stored = PLAIN_BYTES * shape.n_expert_weights if sizes is None else sizes.expert_bytes
    beside = int(ROOM) + PLAIN_BYTES * shape.n_other_weights
    least = min(everything, held_as * (shape.top_k + shape.layers))
    other_s = PLAIN_BYTES * shape.n_read / machine.memory / shape.layers + LAYER_S
    room = memory - beside

    def costs(read_s: float) -> Costs:
        decode_s = 0.0 if sizes is None else sizes.decode_of(slots)
        return Costs(read_s, decode_s, machine.compute_s[slots], other_s, shape.layers, shape.top_k)

    def made(where: Where, held: float, seconds: float | None) -> Running:
        rate = None if sizes is None else sizes.rate
        return Running(rate, slots, memory, where, held, beside + least, seconds)

    if room < least:
        return made("no", 0.0, None)
    if room >= everything:
        return made("decoded", 1.0, costs(0.0).overlapped_s(1.0))
    held = room / everything
    found = made("disk", held, costs(stored / n_experts / machine.disk).overlapped_s(held))
    if sizes is not None and room - stored >= least:
        held = (room - stored) / everything
        waiting = made("memory", held, costs(0.0).overlapped_s(held))
        found = min(waiting, found, key=lambda way: way.seconds or math.inf)
    return found


def all_running(
    shape: Shape, estimates: list[Estimate], machine: Machine, memory: int
) -> list[Running]:
    """As it is, then at each rate with each kind of slots that the model's layout allows."""
    kinds = _SLOTS if shape.codes else _SLOTS[:1]
    found = [running(shape, None, "values", machine, memory)]
    return found + [running(shape, e, slots, machine, memory) for e in estimates for slots in kinds]
