"""What a model's routed experts take, and where: counts that memory is divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from moebound.cache import Catalog
from moebound.codec.device import Stream
from moebound.codec.device.resident import resident_bytes
from moebound.fit.shape import Shape
from moebound.offload.split import Sized

SlotsKind = Literal["values", "codes"]
KINDS: tuple[SlotsKind, ...] = ("values", "codes")


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
    cache, by kind of slots. device: None where no GPU decodes them."""

    n_asked: int
    all_bytes: int
    largest: int
    everything: Mapping[SlotsKind, int]
    floor: Mapping[SlotsKind, int]
    device: OnDevice | None = None

    @property
    def mean_bytes(self) -> float:
        return self.all_bytes / self.n_asked


@dataclass(frozen=True)
class _Alike:
    """One of many that take as much."""

    n_bytes: int


def alike(shape: Shape, n_bytes: int, streams: Sequence[Stream] = ()) -> Experts:
    """All experts as large as one. streams: that one's matrices."""
    n = shape.layers * shape.n_experts
    device = None
    if streams:
        device = OnDevice(
            [_Alike(n_bytes)] * n,
            resident_bytes(streams),
            resident_bytes(streams, tables=False),
            segment_of(streams),
        )
    sizes = {kind: expert_bytes(shape, kind) for kind in KINDS}
    return Experts(
        n,
        n * n_bytes,
        n_bytes,
        {kind: n * size for kind, size in sizes.items()},
        {kind: _floor(shape.layers, shape.n_experts, shape.top_k, s) for kind, s in sizes.items()},
        device,
    )


@cache
def as_it_is(shape: Shape) -> Experts:
    """Uncompressed."""
    return alike(shape, expert_bytes(shape, "values"))


def expert_bytes(shape: Shape, kind: SlotsKind) -> int:
    """Of one, in a slot."""
    return shape.expert_size * (shape.plain_bytes if kind == "values" else 1)


def segment_of(streams: Sequence[Stream]) -> int:
    """Weights that one warp decodes, of the largest array."""
    coded = [stream.coded for stream in streams if stream.coded is not None]
    return max((some.rows_per_segment * some.columns for some in coded), default=0)


@cache
def _floor(layers: int, n_experts: int, top_k: int, n_bytes: int) -> int:
    catalog = Catalog.uniform(dict.fromkeys(range(layers), n_experts), n_bytes)
    return catalog.smallest_budget(floor=1, working=top_k + 1)
