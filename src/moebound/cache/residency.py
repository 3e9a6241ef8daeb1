"""Who is resident, and who goes: bytes, floors and pins, by expert number.

The one place where evictions are decided, for the live cache (cache.py) and the simulator
(simulate.py) alike. Not thread safe: the live cache holds its lock around every call.

For each layer there is a heap of its residents by value. A use only changes the policy's list of
values, which costs nothing here; a heap is put right when its lowest entry comes up and has risen
since. So a hit takes no time, and an eviction a few heap steps.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from operator import add

from moebound.cache.catalog import Catalog
from moebound.cache.policies import Policy


class Residency:
    """At most budget_bytes of experts.

    floor: of each layer, so many residents are never evicted for the sake of another layer.
    working: so many experts of one layer may be pinned at a time and always find room.
    resident, pins, counts, free_bytes are for reading.
    Raises CacheError if the budget is below `catalog.smallest_budget`.
    """

    def __init__(
        self, catalog: Catalog, budget_bytes: int, policy: Policy, *, floor: int, working: int
    ) -> None:
        catalog.check_budget(budget_bytes, floor=floor, working=working)
        policy.begin(catalog)
        self.catalog = catalog
        self.policy = policy
        self.budget_bytes = budget_bytes
        self.floor = floor
        self.free_bytes = budget_bytes
        self.resident = bytearray(len(catalog))
        self.pins = [0] * len(catalog)
        # Most policies leave these as they are; a call for nothing, per expert, is worth saving.
        self._admitted = None if type(policy).admitted is Policy.admitted else policy.admitted
        self._evicted = None if type(policy).evicted is Policy.evicted else policy.evicted
        n_layers = len(catalog.layers)
        self.counts = [0] * n_layers
        """By layer: residents, and those on their way."""
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in range(n_layers)]
        self._lowest = [inf] * n_layers
        """By layer, the value on top of its heap: the lowest there, or below it."""
        self._open = [inf] * n_layers
        """The same, but inf for a layer at its floor: closed to the needs of others."""

    def begin_sequence(self) -> None:
        """A new text begins."""
        if self.policy.begin_sequence():
            value = self.policy.value
            for place, heap in enumerate(self._heaps):
                heap[:] = [(value[expert], expert) for _, expert in heap]
                heapify(heap)
                self._settle(place)

    def make_room(
        self, need_bytes: int, place: int, *, keep: Callable[[int], bool] | None = None
    ) -> list[int] | None:
        """Evict until need_bytes are free for layer `place`; the experts evicted, in order.

        Never pinned ones, none that `keep` says yes to, and no other layer's below the floor.
        None, and nothing evicted, if that is not enough.
        """
        missing = need_bytes - self.free_bytes
        if missing <= 0:
            return []
        heaps, lowest, open_ = self._heaps, self._lowest, self._open
        value, pins, held = self.policy.value, self.pins, self.catalog.held_bytes
        counts, floor = self.counts, self.floor
        bias = self.policy.bias(place)
        ranks = open_[:] if bias is None else list(map(add, open_, bias))
        ranks[place] = lowest[place] if bias is None else lowest[place] + bias[place]
        gone, aside = list[int](), list[int]()
        while missing > 0:
            rank = min(ranks)
            if rank == inf:
                break
            at = ranks.index(rank)
            heap = heaps[at]
            stored, expert = heap[0]
            now = value[expert]
            if now != stored:
                heapreplace(heap, (now, expert))
                stored, expert = heap[0]
                while (now := value[expert]) != stored:
                    heapreplace(heap, (now, expert))
                    stored, expert = heap[0]
                lowest[at] = stored
            else:
                heappop(heap)
                if pins[expert] or (keep is not None and keep(expert)):
                    aside.append(expert)
                else:
                    gone.append(expert)
                    counts[at] -= 1
                    missing -= held[expert]
                lowest[at] = heap[0][0] if heap else inf
            if counts[at] <= floor:
                open_[at] = inf
                if at != place:
                    ranks[at] = inf
                    continue
            else:
                open_[at] = lowest[at]
            ranks[at] = lowest[at] if bias is None else lowest[at] + bias[at]
        place_of = self.catalog.place_of
        if missing > 0:
            for expert in gone:
                counts[place_of[expert]] += 1
            aside += gone
        for expert in aside:
            at = place_of[expert]
            heappush(heaps[at], (value[expert], expert))
            self._settle(at)
        if missing > 0:
            return None
        resident, free = self.resident, self.free_bytes
        for expert in gone:
            resident[expert] = 0
            free += held[expert]
        self.free_bytes = free
        if self._evicted is not None:
            for expert in gone:
                self._evicted(expert)
        return gone

    def hold(self, expert: int) -> None:
        """Take the bytes of an expert that will come. There must be room."""
        place = self.catalog.place_of[expert]
        self.free_bytes -= self.catalog.held_bytes[expert]
        self.counts[place] += 1
        if self.counts[place] > self.floor:
            self._open[place] = self._lowest[place]

    def let_go(self, expert: int) -> None:
        """Give back the bytes of one that did not come after all."""
        place = self.catalog.place_of[expert]
        self.free_bytes += self.catalog.held_bytes[expert]
        self.counts[place] -= 1
        self._settle(place)

    def admit(self, expert: int) -> None:
        """One that was held has come, and is resident."""
        place = self.catalog.place_of[expert]
        self.resident[expert] = 1
        if self._admitted is not None:
            self._admitted(expert)
        rank = self.policy.value[expert]
        heappush(self._heaps[place], (rank, expert))
        if rank < self._lowest[place]:
            self._lowest[place] = rank
            if self.counts[place] > self.floor:
                self._open[place] = rank

    def bring(self, experts: list[int], place: int) -> int | None:
        """Make room for these experts of one layer, which are not resident, and admit them all.
        How many were evicted for it; None, and nothing changed, if there is no room."""
        held, value, resident = self.catalog.held_bytes, self.policy.value, self.resident
        need = sum([held[expert] for expert in experts])
        gone = 0
        if need > self.free_bytes:
            evicted = self.make_room(need, place)
            if evicted is None:
                return None
            gone = len(evicted)
        self.free_bytes -= need
        self.counts[place] += len(experts)
        heap = self._heaps[place]
        for expert in experts:
            resident[expert] = 1
            if self._admitted is not None:
                self._admitted(expert)
            heappush(heap, (value[expert], expert))
        self._lowest[place] = heap[0][0]
        self._open[place] = heap[0][0] if self.counts[place] > self.floor else inf
        return gone

    def _settle(self, place: int) -> None:
        heap = self._heaps[place]
        self._lowest[place] = heap[0][0] if heap else inf
        self._open[place] = self._lowest[place] if self.counts[place] > self.floor else inf
