"""How memory is divided between compressed experts and decoded ones: counts, nothing is measured.

`choose` asks with what it has found in a store, and `moebound fit` before there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from moebound.offload.decoding import room_for


class Sized(Protocol):
    """An expert as it lies on disk."""

    @property
    def n_bytes(self) -> int: ...


SomeExpert = TypeVar("SomeExpert", bound=Sized)


@dataclass(frozen=True)
class DeviceSplit(Generic[SomeExpert]):
    """held: the experts that are compressed on the device. held_bytes: what they are expected to
    take there, headers and tables too. share: how many they are of those that are asked for.
    rest_bytes: of all others, which wait in `rest`."""

    held: Sequence[SomeExpert]
    held_bytes: int
    share: float
    rest_bytes: int
    rest: Literal["ram", "disk"]


def split_device(
    candidates: Sequence[SomeExpert],
    *,
    asked_for: int,
    all_bytes: int,
    limit: int,
    beside: int,
    host_bytes: int,
) -> DeviceSplit[SomeExpert]:
    """As many compressed experts as a limit holds, one at least.

    candidates: those that a device can decode, the first ones first. asked_for: how many a model
    may need. all_bytes: of everything on disk. beside: what an expert takes on the device beside
    its bytes. host_bytes: of pinned memory; the rest stays on disk if it is larger.
    """
    held = first_fitting(candidates, limit, beside) or candidates[:1]
    rest_bytes = all_bytes - sum(expert.n_bytes for expert in held)
    return DeviceSplit(
        held,
        sum(room_for(1, expert.n_bytes) + beside for expert in held),
        len(held) / asked_for,
        rest_bytes,
        "ram" if rest_bytes <= host_bytes else "disk",
    )


def first_fitting(
    candidates: Sequence[SomeExpert], limit: int, beside: int
) -> Sequence[SomeExpert]:
    """The first of them, as many as a limit is expected to hold."""
    found = list[SomeExpert]()
    for expert in candidates:
        limit -= room_for(1, expert.n_bytes) + beside
        if limit < 0:
            break
        found.append(expert)
    return found


def cache_room(budget: int, held: int, everything: int, floor: int) -> int | None:
    """Bytes for decoded experts, of which all take `everything`, beside `held` bytes of compressed
    ones; None where that is less than `floor`, the least cache."""
    room = min(budget - held, everything)
    return None if room < floor else room
