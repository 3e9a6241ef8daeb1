"""Threads that bring experts in: make room, read, decode, hand over.

What a forward pass waits for is loaded in the order it is asked for; what a predictor expects comes
after that, and only where it displaces nothing that is in use. Each thread takes one expert, or as
many as its delivery brings together, through all stations, so that one is read while others are
decoded. Reading and decoding let go of the interpreter.

**Shared parts.** What several experts need to be decoded is asked for before them, and held by the
cache like an expert; whoever decodes waits for it. For an expert that is only expected, a part that
is not there is read aside, and not kept.

**Order.** Room is taken by one thread at a time, in the order asked. So a computation that uses
experts in that order always finds the next one coming, whatever the cache's size, and its release
makes the room that the one after it waits for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from moebound.cache import ExpertCache
from moebound.cache.claim import Claim
from moebound.errors import CacheError
from moebound.methods import FindPart, OpenPart
from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.entries import DiskEntry
from moebound.offload.meter import Load, Meter, clock
from moebound.offload.slots import Slot, SlotKind, SlotPool
from moebound.store.reader import StoredPart
from moebound.types import ExpertKey

Held = Slot | OpenPart
"""What the cache holds: a decoded expert, or a part that several experts share."""


@dataclass(eq=False)
class Order:
    """One expert that was asked for. arrived: its slot; None if somebody else has brought it, or
    brings it, so that the cache knows."""

    key: ExpertKey
    speculative: bool
    asked: float
    arrived: Future[Held | None] = field(default_factory=Future)


class Loader:
    """n_threads that load. entries: of every expert and shared part. kinds: of every expert.

    Close it: threads end, and orders that nobody took are cancelled. Close the cache before, in
    which one may be waiting for room.
    """

    def __init__(
        self,
        cache: ExpertCache[Held],
        entries: Mapping[ExpertKey, DiskEntry],
        kinds: Mapping[ExpertKey, SlotKind],
        delivery: Delivery,
        pool: SlotPool,
        meter: Meter,
        *,
        n_threads: int,
    ) -> None:
        self._cache, self._entries, self._kinds = cache, entries, kinds
        self._any_shared = any(entry.needs for entry in entries.values())
        self._delivery, self._pool, self._meter = delivery, pool, meter
        self._turn = threading.Lock()
        self._asked = threading.Condition()
        self._demanded, self._expected = deque[Order](), deque[Order]()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"moebound-loader-{i}", daemon=True)
            for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pool_bytes(self) -> int:
        """Memory of all slots."""
        return self._pool.made_bytes

    def on_device(self, keys: Iterable[ExpertKey]) -> int:
        """How many of these wait on the device that computes."""
        return sum(key in self._delivery.on_device for key in keys)

    def demand(self, keys: Iterable[ExpertKey]) -> list[Order]:
        """Load these, in this order, before anything else."""
        now = clock()
        orders = [Order(key, False, now) for key in keys]
        with self._asked:
            self._demanded.extend(orders)
            self._asked.notify_all()
        return orders

    def expect(self, keys: Iterable[ExpertKey]) -> None:
        """Load these when there is nothing else to do. Replaces what was expected before."""
        now = clock()
        orders = [Order(key, True, now) for key in keys]
        with self._asked:
            self._expected.clear()
            self._expected.extend(orders)
            self._asked.notify_all()

    def cancel(self, orders: Iterable[Order]) -> None:
        """Do not begin these any more."""
        for order in orders:
            order.arrived.cancel()

    def close(self) -> None:
        with self._asked:
            self._closed = True
            for order in (*self._demanded, *self._expected):
                order.arrived.cancel()
            self._asked.notify_all()
        for thread in self._threads:
            thread.join()

    def shared(self, keys: Iterable[ExpertKey]) -> dict[ExpertKey, None]:
        """The shared parts that decoding these experts takes, each once, in their order."""
        if not self._any_shared:
            return {}
        return dict.fromkeys(part for key in keys for part in self._entries[key].needs)

    def load(self, claim: Claim[Held], order: Order) -> Held:
        """Bring in the claimed expert, here and now, and fill the claim. Raises what reading and
        decoding raise; the claim is then abandoned."""
        self._reuse(claim)
        return self._bring(claim, order, self._delivery.workspace())

    def _work(self) -> None:
        workspace = self._delivery.workspace()
        while (taken := self._take()) is not None:
            alone = [t for t in taken if self._entries[t[0].key].shared is not None]
            others = [t for t in taken if self._entries[t[0].key].shared is None]
            if len(others) < 2 or not self._bring_all(others, workspace):
                alone += others
            for order, claim in alone:
                try:
                    order.arrived.set_result(self._bring(claim, order, workspace))
                except BaseException as error:
                    order.arrived.set_exception(error)

    def _bring(self, claim: Claim[Held], order: Order, workspace: Any) -> Held:
        with claim:
            part = self._entries[order.key].shared
            if part is not None:
                opened = self._open(part, self._entries[order.key], workspace)
                claim.fill(opened)
                return opened
            arrival = self._arrival(order)
            try:
                self._delivery.bring([arrival], workspace)
            except BaseException:
                self._pool.give(arrival.slot)  # before the claim's room is free again
                raise
            return self._there(claim, arrival)

    def _open(self, part: StoredPart, entry: DiskEntry, workspace: Any) -> OpenPart:
        data = bytes(self._delivery.bytes_of(entry, workspace))
        self._pool.lend(part.record.held_bytes)
        try:
            return OpenPart.of(data, part.record.group, part.record.number)
        except BaseException:
            self._pool.lend(-part.record.held_bytes)
            raise

    def _shared(self, order: Order) -> FindPart | None:
        """Where an expert's shared parts come from: the cache, if it has any."""
        keys = self._entries[order.key].needs
        if not keys:
            return None
        by_part = dict[tuple[int, int], ExpertKey]()
        for key in keys:
            part = self._entries[key].shared
            if part is not None:
                by_part[part.record.group, part.record.number] = key

        def find(group: int, number: int) -> OpenPart:
            key = by_part[group, number]
            found = self._cache.peek(key)
            if found is None and not order.speculative:
                obtained = self._cache.obtain(key)
                if isinstance(obtained, Claim):
                    asked = Order(key, False, clock())
                    found = self.load(obtained, asked)
                else:
                    found = obtained
            if isinstance(found, OpenPart):
                return found
            part = self._entries[key].shared
            assert part is not None
            return OpenPart.of(part.read(), group, number)

        return find

    def _bring_all(self, taken: list[tuple[Order, Claim[Held]]], workspace: Any) -> bool:
        """Together; False, and nothing done, if that fails: whose fault it is shows one by one."""
        arrivals = list[Arrival]()
        try:
            for order, _ in taken:
                arrivals.append(self._arrival(order))
            self._delivery.bring(arrivals, workspace)
        except Exception:
            for arrival in arrivals:
                self._pool.give(arrival.slot)
            return False
        for (order, claim), arrival in zip(taken, arrivals, strict=True):
            order.arrived.set_result(self._there(claim, arrival, len(taken)))
        return True

    def _arrival(self, order: Order) -> Arrival:
        entry = self._entries[order.key]
        moved = 0 if order.key in self._delivery.on_device else entry.n_bytes
        load = Load(order.key, moved, entry.n_weights, order.speculative, order.asked, clock())
        slot = self._pool.take(self._kinds[order.key])
        return Arrival(entry, slot, load, self._shared(order))

    def _there(self, claim: Claim[Held], arrival: Arrival, n_together: int = 1) -> Slot:
        arrival.slot.load = arrival.load
        self._meter.loaded(arrival.load.share(n_together))
        claim.fill(arrival.slot)
        return arrival.slot

    def _reuse(self, claim: Claim[Held]) -> None:
        """The memory of those who made room."""
        for _, evicted in claim.evicted:
            if isinstance(evicted, Slot):
                self._pool.give(evicted)
            else:
                self._pool.lend(-evicted.held_bytes)

    def _take(self) -> list[tuple[Order, Claim[Held]]] | None:
        """The next orders to carry out, with room for each; None when this is closed. Waits for
        room for the first; of others that are waited for, as many as find room at once."""
        with self._turn:
            order = self._next()
            if order is None:
                return None
            claim = self._claim(order)
            taken = [] if claim is None else [(order, claim)]
            while len(taken) < self._delivery.together and (more := self._one_more()) is not None:
                taken.append(more)
        return taken

    def _one_more(self) -> tuple[Order, Claim[Held]] | None:
        with self._asked:
            while self._demanded:
                order = self._demanded[0]
                try:
                    claim = self._cache.claim(order.key, timeout=0)
                except CacheError:
                    return None  # no room yet: whoever takes it next waits
                self._demanded.popleft()
                wanted = order.arrived.set_running_or_notify_cancel()
                if claim is None:
                    if wanted:
                        order.arrived.set_result(None)
                    continue
                self._reuse(claim)
                if wanted:
                    return order, claim
                claim.abandon()  # cancelled meanwhile
        return None

    def _next(self) -> Order | None:
        """The next order to carry out; None when this is closed."""
        with self._asked:
            while True:
                if self._closed:
                    return None
                for orders in (self._demanded, self._expected):
                    while orders:
                        order = orders.popleft()
                        if order.arrived.set_running_or_notify_cancel():
                            return order
                self._asked.wait()

    def _claim(self, order: Order) -> Claim[Held] | None:
        try:
            claim = self._cache.claim(order.key, speculative=order.speculative)
        except CacheError as error:
            order.arrived.set_exception(error)
            return None
        if claim is None:
            order.arrived.set_result(None)
        else:
            self._reuse(claim)
        return claim
