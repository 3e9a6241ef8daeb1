"""Sizes and times of a model that is not here, measured on random experts of its shape that are.

Bits a weight are those of real bytes: matrices of normal values in bfloat16, each row with a scale
of its own as trained rows have (`bench/matrices.py`), encoded by codec `bound`. Trained matrices
took 0.04 bits more (docs/fit.md). Everything else follows by multiplication.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from moebound.bench.matrices import synthetic
from moebound.codec import Encoded, decode, encode_certified, thread_count
from moebound.codec.device import read_stream
from moebound.fit.experts import (
    Experts,
    Linears,
    alike,
    kinds_of,
    linears_like,
    room_for,
    to_codes,
)
from moebound.fit.shape import Shape
from moebound.offload.codes import SlotsName
from moebound.offload.slots import SlotKind
from moebound.offload.split import cache_room
from moebound.store.format import Others
from moebound.types import NO_LOSS, Array, ErrorBound

RATES = (0.1, 0.3, 0.8)
PLAIN_BYTES = 2
"""Of a weight in bfloat16, as a model is without moebound."""
_REPEATS = 5
ROOM = 1.5e9
"""Bytes for the program, activations and a short text's cache, where memory is divided."""


@dataclass(frozen=True)
class Fits:
    """How a model would lie in so much memory.

    where: "decoded" (all experts, nothing to do while it runs), "memory" (compressed experts in
    memory, some decoded beside them), "disk" (they are read from disk), "no" (not even what is not
    experts fits). held: the share of experts that can be decoded at a time, 0 to 1.
    """

    memory: int
    where: str
    held: float


@dataclass(frozen=True)
class Estimate:
    """One rate; None: a store's own bytes. bits: a routed expert's weight; model_bits: any weight's
    of the whole model. *_bytes: of all routed experts, and of the whole model. compress_s: on
    `threads` threads here, disks not counted; 0 for a store. decode_s, codes_s, codes4_s: of one
    expert, to weights, to codes of a byte and to those of four bits, with as many threads; 0 where
    no expert can be so. fits: None if no memory was given. experts: what they take where. linears:
    which linear layers that are no expert's are codes."""

    rate: float | None
    bits: float
    expert_bytes: int
    model_bytes: int
    threads: int
    compress_s: float
    decode_s: float
    fits: Fits | None
    model_bits: float
    codes_s: float
    codes4_s: float
    experts: Experts = field(repr=False)
    linears: Linears = field(default_factory=Linears, repr=False)

    @property
    def name(self) -> str:
        """In a table."""
        return "as stored" if self.rate is None else f"rate {self.rate:g}"

    def to_json(self) -> dict[str, Any]:
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        del found["experts"]
        device = self.experts.device
        return found | {
            "fits": None if self.fits is None else asdict(self.fits),
            "linears": asdict(self.linears),
            "device_beside_bytes": None if device is None else device.beside,
        }

    def decode_of(self, slots: SlotsName) -> float:
        """Seconds an expert, to what slots of this kind hold."""
        return {"values": self.decode_s, "codes": self.codes_s, "codes4": self.codes4_s}[slots]


def estimate(
    shape: Shape,
    rates: Sequence[float] = RATES,
    *,
    memory: int | None = None,
    seed: int = 0,
    others: Others = "lossless",
    codec: str = "bound",
    linears: SlotsName = "values",
) -> list[Estimate]:
    """One for each rate, by encoding and decoding one random expert of this shape.

    rates: α, of the mean |weight| of the expert. memory: bytes there are, to say what fits.
    others: of all other weights, as `store.compress` takes it; their sizes are those of one random
    matrix, the few that are not coded counted with them. codec: of the experts,
    "bound" or one with parameters. linears: what linear layers that are no expert's are to be held
    as, which takes a rate for others.
    Raises BoundError for a rate that is not above 0.
    """
    threads, found, matrices = thread_count(), list[Estimate](), _expert(shape, seed)
    other = _encoded_other(others, seed)
    of_others = _bytes_a_weight(other) * shape.n_other_weights
    held = Linears() if other is None else linears_like(other, shape.n_linear, linears)
    for rate in rates:
        bound = ErrorBound(rate, "rate")
        began = time.perf_counter()
        encoded = list[Encoded]()
        for matrix in matrices:
            encoded.append(encode_certified(matrix, bound, codec=codec, threads=threads))
            hashlib.sha256(matrix.view(np.uint8).data)  # the certificate has both hashes
            hashlib.sha256(encoded[-1].data)
        encode_s = time.perf_counter() - began
        kinds = kinds_of(shape, encoded)
        seconds = _least_s(encoded, kinds, threads)
        share = shape.n_expert_weights / shape.expert_size
        one = sum(len(each.data) for each in encoded)
        n_bytes = int(one * share)
        whole = n_bytes + int(of_others)
        experts = alike(shape, one, kinds, [read_stream(each.data) for each in encoded])
        fits = None if memory is None else fits_in(shape, experts, memory)
        bits = 8 * n_bytes / shape.n_expert_weights
        found.append(
            Estimate(
                rate,
                bits,
                n_bytes,
                whole,
                threads,
                encode_s * share,
                seconds["values"],
                fits,
                8 * whole / shape.n_weights,
                seconds.get("codes", 0.0),
                seconds.get("codes4", 0.0),
                experts,
                held,
            )
        )
    return found


def random_expert(shape: Shape, rate: float, codec: str, *, seed: int = 0) -> list[bytes]:
    """The envelopes of one."""
    bound = ErrorBound(rate, "rate")
    return [encode_certified(m, bound, codec=codec).data for m in _expert(shape, seed)]


def _expert(shape: Shape, seed: int) -> list[Array]:
    return [
        synthetic(["gaussian-rows"], shape=sides, seed=seed + i)[0].array
        for i, sides in enumerate(shape.expert)
    ]


def _least_s(
    encoded: Sequence[Encoded], kinds: Mapping[SlotsName, SlotKind], threads: int
) -> dict[SlotsName, float]:
    """Seconds to decode an expert, by kind of slots: the least of some, since what else runs now is
    not what will run. Into memory that was used before, as that of slots is."""
    rooms: dict[SlotsName, list[Any]] = {
        slots: [
            decode(each.data) if slots == "values" else room_for(each, kind.bits)
            for each in encoded
        ]
        for slots, kind in kinds.items()
    }
    found = dict.fromkeys(kinds, math.inf)
    for _ in range(_REPEATS):
        for slots, kind in kinds.items():
            began = time.perf_counter()
            for each, room in zip(encoded, rooms[slots], strict=True):
                if slots == "values":
                    decode(each.data, out=room)
                else:
                    to_codes(each, room, bits=kind.bits, threads=threads)
            found[slots] = min(found[slots], time.perf_counter() - began)
    return found


def _encoded_other(others: Others, seed: int) -> Encoded | None:
    """A random tensor that is no routed expert's; None where they are kept."""
    if others == "keep":
        return None
    matrix = synthetic(["gaussian-rows"], shape=(1024, 1024), seed=seed)[0].array
    bound = NO_LOSS if isinstance(others, str) else ErrorBound(others, "rate")
    codec = "lossless" if isinstance(others, str) else "bound"
    return encode_certified(matrix, bound, codec=codec)


def _bytes_a_weight(other: Encoded | None) -> float:
    return PLAIN_BYTES if other is None else len(other.data) / other.certificate.n_weights


def fits_in(shape: Shape, experts: Experts, memory: int) -> Fits:
    """With slots of values."""
    everything, least = experts.everything["values"], experts.floor["values"]
    room = memory - int(ROOM) - shape.plain_bytes * shape.n_other_weights
    decoded = cache_room(room, 0, everything, least)
    if decoded is None:
        return Fits(memory, "no", 0.0)
    if decoded == everything:
        return Fits(memory, "decoded", 1.0)
    beside = cache_room(room, experts.all_bytes, everything, least)
    if beside is not None:
        return Fits(memory, "memory", beside / everything)
    return Fits(memory, "disk", decoded / everything)
