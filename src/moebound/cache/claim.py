"""What the live cache hands out: what a visit found, and the right to load an expert."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from moebound.types import ExpertKey

V = TypeVar("V")


class Claimed(Protocol[V]):
    """What a claim was made on: the live cache."""

    def filled(self, claim: Claim[V], value: V) -> None: ...
    def abandoned(self, claim: Claim[V], error: BaseException | None) -> None: ...


@dataclass(frozen=True)
class Found(Generic[V]):
    """A visit's experts, each pinned once: residents, in the order asked, and what is missing.

    A pin on one that is not there yet takes no room, and holds it from the moment it comes.
    """

    hits: dict[ExpertKey, V]
    missing: tuple[ExpertKey, ...]

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        """All of them: what has to be released."""
        return (*self.hits, *self.missing)


@dataclass
class CacheStats:
    """Since the cache was made. accesses: experts that visits asked for; hits: found resident.
    loads: experts filled in, and their bytes moved; speculative: loads by speculative claims."""

    accesses: int = 0
    hits: int = 0
    loads: int = 0
    speculative: int = 0
    moved_bytes: int = 0
    evictions: int = 0


class Claim(Generic[V]):
    """Room for one expert, taken by whoever loads it. As a context, it is abandoned with the error
    that leaves the block, or without one if the block ends unfilled.

    evicted: who made room, with their values, whose memory the loader may use again.
    """

    def __init__(
        self,
        cache: Claimed[V],
        key: ExpertKey,
        number: int,
        evicted: tuple[tuple[ExpertKey, V], ...],
        speculative: bool,
    ) -> None:
        self.key = key
        self.number = number
        self.evicted = evicted
        self.speculative = speculative
        self._cache = cache

    def fill(self, value: V) -> None:
        """It has come: resident from now on, and whoever waits for it wakes.

        Raises CacheError if the claim was filled or abandoned before.
        """
        self._cache.filled(self, value)

    def abandon(self, error: BaseException | None = None) -> None:
        """It will not come; its room is free again. Whoever waits for it gets the error, until
        somebody claims the expert anew. Does nothing once filled or abandoned."""
        self._cache.abandoned(self, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon(error)
