"""What a model's routed experts take, and where: counts that memory is divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch

from moebound.cache import Catalog
from moebound.codec import Encoded
from moebound.codec.at_once import codes_at_once
from moebound.codec.codes import Bits, CodeMatrix, Read, code_bytes, decode_codes, has_codes
from moebound.codec.device import Stream
from moebound.codec.device.resident import resident_bytes
from moebound.codec.envelope import parse
from moebound.fit.shape import Shape
from moebound.offload.codes import (
    MOST_PATCHED,
    PATCH_BYTES,
    SlotsName,
    few_outside,
    most_aside,
    most_held,
)
from moebound.offload.slots import SlotKind
from moebound.offload.split import Sized
from moebound.types import Array


@dataclass(frozen=True)
class OnDevice:
    """What the experts that a GPU decodes take there. experts: in the order in which they are taken
    in. beside: bytes beside an expert's own, headers and tables; headers: the former alone.
    segment_weights: of the streams, as kernels see them."""

    experts: Sequence[Sized]
    beside: int
    headers: int
    segment_weights: int


@dataclass(frozen=True)
class Experts:
    """n_asked: those that a model may need. all_bytes: as they wait, with what they share. largest:
    bytes of one, at most. everything, floor: bytes of all, ready to compute with, and of the least
    cache, by kind of slots, of those that experts can lie in. device: None where no GPU decodes
    them."""

    n_asked: int
    all_bytes: int
    largest: int
    everything: Mapping[SlotsName, int]
    floor: Mapping[SlotsName, int]
    device: OnDevice | None = None

    @property
    def mean_bytes(self) -> float:
        return self.all_bytes / self.n_asked


@dataclass(frozen=True)
class Linears:
    """Linear layers that are no expert's, those that are codes: weights by what holds them, and
    bytes of all of them."""

    weights: Mapping[SlotsName, int] = field(default_factory=dict)
    n_bytes: int = 0

    @property
    def n_weights(self) -> int:
        return sum(self.weights.values())


def linears_like(encoded: Encoded, n_weights: int, linears: SlotsName) -> Linears:
    """So many weights held as this matrix can be, by the rules of `offload.linears`."""
    if linears == "values" or not _as_codes(encoded):
        return Linears()
    certificate = encoded.certificate
    outside, bits, kind = None, 8, "codes"  # type: int | None, Bits, SlotsName
    if linears == "codes4":
        outside = few_outside(
            _reader(encoded.data), certificate, partial(to_codes, encoded, bits=4)
        )
    if outside is not None:
        bits, kind = 4, "codes4"
    n_bytes = most_held(certificate, bits, outside or 0)
    return Linears({kind: n_weights}, n_weights * n_bytes // certificate.n_weights)


@dataclass(frozen=True)
class _Alike:
    """One of many that take as much."""

    n_bytes: int


def alike(
    shape: Shape,
    n_bytes: int,
    kinds: Mapping[SlotsName, SlotKind],
    streams: Sequence[Stream] = (),
) -> Experts:
    """All experts as large as one. kinds: slots that it can lie in. streams: its matrices."""
    n = shape.layers * shape.n_experts
    device = None
    if streams:
        device = OnDevice(
            [_Alike(n_bytes)] * n,
            resident_bytes(streams),
            resident_bytes(streams, tables=False),
            segment_of(streams),
        )
    sizes = {slots: kind.n_bytes for slots, kind in kinds.items()}
    return Experts(
        n,
        n * n_bytes,
        n_bytes,
        {slots: n * size for slots, size in sizes.items()},
        {of: _floor(shape.layers, shape.n_experts, shape.top_k, s) for of, s in sizes.items()},
        device,
    )


@cache
def as_it_is(shape: Shape) -> Experts:
    """Uncompressed."""
    kind = kind_of(shape)
    return alike(shape, kind.n_bytes, {"values": kind})


def kind_of(shape: Shape) -> SlotKind:
    """Slots of values for its experts, as products are timed with."""
    *into, down = shape.expert
    rows = sum(sides[0] for sides in into)
    return SlotKind(
        (("first", (rows, into[0][1])), ("down_proj", down)),
        torch.float32 if shape.plain_bytes == 4 else torch.bfloat16,
        gated=False, transposed=False, interleaved=False,
    )  # fmt: skip


def kinds_of(shape: Shape, encoded: Sequence[Encoded]) -> dict[SlotsName, SlotKind]:
    """All slots that an expert can lie in, by the rules of `offload.codes`. encoded: its
    matrices."""
    values = kind_of(shape)
    found: dict[SlotsName, SlotKind] = {"values": values}
    if not shape.codes or not all(map(_as_codes, encoded)):
        return found
    beside = sum(most_aside(each.certificate) for each in encoded)
    found["codes"] = replace(values, aside_bytes=beside)
    outside = list[int]()
    for each in encoded:
        n = few_outside(_reader(each.data), each.certificate, partial(to_codes, each, bits=4))
        if n is None:
            return found
        outside.append(n)
    beside += PATCH_BYTES * sum(outside)
    found["codes4"] = replace(values, aside_bytes=beside, bits=4)
    return found


def _as_codes(encoded: Encoded) -> bool:
    """Whether a matrix can be codes of a byte."""
    certificate = encoded.certificate
    few = certificate.patched <= MOST_PATCHED * certificate.n_weights
    return few and has_codes(_reader(encoded.data)) is None


def to_codes(encoded: Encoded, out: Array, *, bits: Bits, threads: int = 1) -> CodeMatrix:
    """Decode a matrix as slots of codes do. out: flat uint8, of `code_bytes`."""
    rows, columns = encoded.certificate.shape
    found = codes_at_once(
        encoded.data, out, (rows, columns), encoded.certificate.dtype, bits=bits, threads=threads
    )
    if found is not None:
        return found
    return decode_codes(parse(encoded.data), out, bits=bits, threads=threads)


def room_for(encoded: Encoded, bits: Bits) -> Array:
    """Memory for `to_codes`, written once, as that of slots is."""
    rows, columns = encoded.certificate.shape
    return np.full(code_bytes((rows, columns), bits), 0, np.uint8)


def _reader(data: bytes) -> Read:
    return lambda at, n: data[at : at + n]


def segment_of(streams: Sequence[Stream]) -> int:
    """Weights that one warp decodes, of the largest array."""
    coded = [stream.coded for stream in streams if stream.coded is not None]
    return max((some.rows_per_segment * some.columns for some in coded), default=0)


@cache
def _floor(layers: int, n_experts: int, top_k: int, n_bytes: int) -> int:
    catalog = Catalog.uniform(dict.fromkeys(range(layers), n_experts), n_bytes)
    return catalog.smallest_budget(floor=1, working=top_k + 1)
