"""The live cache: decoded experts (or whatever the runtime keeps of them) within a byte budget.

    found = cache.visit(layer, experts)       # the router has decided; all of them are pinned
    for key in found.missing:
        claim = cache.claim(key)              # None: it is there by now, or on its way
        if claim is not None:
            with claim:                       # an error in here gives the room back
                claim.fill(read_and_decode(key))
    ... compute found.hits, then each missing one as cache.wait(key) returns it ...
    cache.release(found.keys)                 # or each as soon as it is computed

Claims may be made and filled by other threads than the one that visits.

Life of an expert: absent -> in flight (its bytes are taken, it cannot be evicted) -> resident, with
pins or without -> absent again. Only residents without pins are evicted.

**Locks.** One lock, inside. It is held for bookkeeping only: never while an expert is read, decoded
or computed, and no code of the caller runs under it but the policy's. Every method may be called
from any thread. `claim`, `wait` and `obtain` may sleep, and let go of the lock meanwhile; call
none of them while holding a lock that a thread needs on its way to `fill`, `abandon` or `release`.
`claim` sleeps while pins take the room that it needs, so a visit of more than `working` experts
must stream: release hits and loaded experts as they are computed, with at most `working` claimed
and not yet released. Sleepers wake with an error after `timeout` seconds, and when it is closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from moebound.cache.catalog import Catalog
from moebound.cache.claim import CacheStats, Claim, Found
from moebound.cache.policies import Policy, make_policy
from moebound.cache.residency import Residency
from moebound.errors import CacheError
from moebound.types import ExpertKey

V = TypeVar("V")

DEFAULT_TIMEOUT_S = 120.0
LIVE_STEPS = 2
"""A speculative claim evicts nothing that was used in this forward pass or the one before."""


@dataclass(frozen=True)
class _Arrived(Generic[V]):
    value: V


class ExpertCache(Generic[V]):
    """At most budget_bytes of experts, counted by the catalog's held_bytes.

    policy: its name, or an object that serves no other cache. floor: of each layer, so many
    residents are never evicted for another layer. working: experts of one layer that are in use at
    a time; top_k + 1 lets one be loaded while a token's are computed.
    Raises CacheError if the budget is too small for that; the message has the smallest.
    """

    def __init__(
        self,
        catalog: Catalog,
        budget_bytes: int,
        *,
        policy: Policy | str = "lru",
        floor: int = 1,
        working: int,
    ) -> None:
        made = make_policy(policy) if isinstance(policy, str) else policy
        self.catalog = catalog
        self.budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._residency = Residency(catalog, budget_bytes, made, floor=floor, working=working)
        self._values: dict[int, V] = {}
        self._in_flight: dict[int, Claim[V]] = {}
        self._failed: dict[int, BaseException] = {}
        self._places = {layer: place for place, layer in enumerate(catalog.layers)}
        self._step, self._place = -1, len(catalog.layers)
        self._last_step = [-LIVE_STEPS - 1] * len(catalog)
        self._counts = CacheStats()
        self._closed = False

    def begin_sequence(self) -> None:
        """A new text begins: policies that watch the sequence start afresh."""
        with self._changed:
            self._residency.begin_sequence()

    def visit(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        tokens: Sequence[int] | None = None,
        leading: int | None = None,
    ) -> Found[V]:
        """A forward pass is at this layer and needs these experts of it, each once.

        tokens: how many tokens chose each; None for one each. leading: so many, the first ones,
        matter most; None for all (`visits.gather` makes all three from a router's choice). A layer
        that does not lie behind the one before begins a new step.
        """
        if layer not in self._places:
            raise CacheError(f"layer {layer}: expected one of {list(self._places)}")
        keys = [ExpertKey(layer, int(expert)) for expert in experts]
        numbers = [self.catalog.number(key) for key in keys]
        if len(set(numbers)) < len(numbers):
            raise CacheError(f"layer {layer}: an expert is asked for twice in one visit")
        place = self._places[layer]
        with self._changed:
            self._check_open()
            if place <= self._place:
                self._step += 1
            self._place = place
            residency = self._residency
            residency.policy.use(
                self._step, place, numbers, tokens, len(numbers) if leading is None else leading
            )
            hits, missing = dict[ExpertKey, V](), list[ExpertKey]()
            for key, number in zip(keys, numbers, strict=True):
                self._last_step[number] = self._step
                residency.pins[number] += 1
                if residency.resident[number]:
                    hits[key] = self._values[number]
                else:
                    missing.append(key)
            self._counts.accesses += len(keys)
            self._counts.hits += len(hits)
            return Found(hits, tuple(missing))

    def peek(self, key: ExpertKey) -> V | None:
        """Its value, if it is resident; nothing is counted, and nothing held."""
        with self._changed:
            return self._values.get(self.catalog.number(key))

    def claim(
        self, key: ExpertKey, *, speculative: bool = False, timeout: float = DEFAULT_TIMEOUT_S
    ) -> Claim[V] | None:
        """Take room for an expert, to load it. None if it is resident or in flight already.

        Whoever holds the claim has to `fill` or `abandon` it. Sleeps while pins leave no room.
        speculative: never sleeps, evicts only what has not been used lately (LIVE_STEPS), and is
        None where that does not make room.
        Raises CacheError if no room is made within timeout seconds, or the cache is closed.
        """
        number = self.catalog.number(key)
        place = self.catalog.place_of[number]
        need = self.catalog.held_bytes[number]
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._check_open()
                if self._residency.resident[number] or number in self._in_flight:
                    return None
                keep = self._is_live if speculative else None
                gone = self._residency.make_room(need, place, keep=keep)
                if gone is not None:
                    break
                if speculative:
                    return None
                if not self._changed.wait(deadline - time.monotonic()):
                    raise CacheError(f"{key}: no room within {timeout:g} s; {self._pinned_text()}")
            evicted = tuple((self.catalog.keys[i], self._values.pop(i)) for i in gone)
            self._counts.evictions += len(gone)
            self._residency.hold(number)
            self._failed.pop(number, None)
            claim = Claim(self, key, number, evicted, speculative)
            self._in_flight[number] = claim
            return claim

    def wait(self, key: ExpertKey, *, timeout: float = DEFAULT_TIMEOUT_S) -> V:
        """An expert of a visit, once it has come. Sleeps until then.

        Raises CacheError, naming the expert, if it is not pinned by a visit, nobody is loading it,
        loading it failed (the cause is chained), it does not come within timeout seconds, or the
        cache is closed.
        """
        found = self._arrived(key, time.monotonic() + timeout)
        if isinstance(found, CacheError):
            raise found
        return found.value

    def obtain(self, key: ExpertKey, *, timeout: float = DEFAULT_TIMEOUT_S) -> V | Claim[V]:
        """As `wait`; but where nobody is loading it, a claim, so that the caller does.

        For an expert that a speculative loader had claimed, and gave up.
        """
        deadline = time.monotonic() + timeout
        while True:
            found = self._arrived(key, deadline)
            if not isinstance(found, CacheError):
                return found.value
            claim = self.claim(key, timeout=deadline - time.monotonic())
            if claim is not None:
                return claim

    def _arrived(self, key: ExpertKey, deadline: float) -> _Arrived[V] | CacheError:
        """The value, or the error that says nobody is loading it."""
        number = self.catalog.number(key)
        residency = self._residency
        with self._changed:
            while True:
                self._check_open()
                if not residency.pins[number]:
                    raise CacheError(f"{key}: waited for, and not pinned by a visit")
                if residency.resident[number]:
                    return _Arrived(self._values[number])
                if number in self._failed:
                    raise CacheError(f"{key}: could not be loaded") from self._failed[number]
                if number not in self._in_flight:
                    return CacheError(f"{key}: not resident, and nobody is loading it")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise CacheError(f"{key}: did not come in time")

    def release(self, keys: Iterable[ExpertKey]) -> None:
        """Take one pin off each. Raises CacheError for one that has none; the rest are released."""
        numbers = [self.catalog.number(key) for key in keys]
        with self._changed:
            pins, free = self._residency.pins, list[int]()
            for number in numbers:
                if pins[number] < 1:
                    free.append(number)
                else:
                    pins[number] -= 1
            self._changed.notify_all()
        if free:
            raise CacheError(f"{self.catalog.keys[free[0]]}: released, and was not pinned")

    def close(self) -> None:
        """Drop all values and wake all sleepers with an error. Claims come to nothing."""
        with self._changed:
            self._closed = True
            self._values.clear()
            self._changed.notify_all()

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether it is resident; another thread may change that at once."""
        return bool(self._residency.resident[self.catalog.number(key)])

    @property
    def used_bytes(self) -> int:
        """Residents and experts in flight."""
        return self.budget_bytes - self._residency.free_bytes

    @property
    def stats(self) -> CacheStats:
        with self._changed:
            return replace(self._counts)

    def _is_live(self, number: int) -> bool:
        return self._step - self._last_step[number] < LIVE_STEPS

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("the expert cache is closed")

    def _pinned_text(self) -> str:
        pins, held = self._residency.pins, self.catalog.held_bytes
        pinned = sum(held[i] for i in self._values if pins[i])
        flying = sum(held[i] for i in self._in_flight)
        return f"of {self.budget_bytes} bytes, {pinned} are pinned and {flying} in flight"

    def filled(self, claim: Claim[V], value: V) -> None:
        """See `Claim.fill`, which calls it."""
        with self._changed:
            if self._in_flight.get(claim.number) is not claim:
                raise CacheError(f"{claim.key}: filled or abandoned before")
            del self._in_flight[claim.number]
            if self._closed:
                self._residency.let_go(claim.number)
                return
            self._values[claim.number] = value
            self._residency.admit(claim.number)
            self._counts.loads += 1
            self._counts.speculative += claim.speculative
            self._counts.moved_bytes += self.catalog.load_bytes[claim.number]
            self._changed.notify_all()

    def abandoned(self, claim: Claim[V], error: BaseException | None) -> None:
        """See `Claim.abandon`, which calls it."""
        with self._changed:
            if self._in_flight.get(claim.number) is not claim:
                return
            del self._in_flight[claim.number]
            self._residency.let_go(claim.number)
            if error is not None:
                self._failed[claim.number] = error
            self._changed.notify_all()
