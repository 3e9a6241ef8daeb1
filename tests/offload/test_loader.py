"""Loading threads: order, room, errors, and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.cache import Catalog, ExpertCache
from moebound.errors import CacheError, CorruptionError
from moebound.offload.delivery import Arrival, Delivery
from moebound.offload.entries import DiskEntry
from moebound.offload.loader import Held, Loader
from moebound.offload.meter import Meter, clock
from moebound.offload.slots import Slot, SlotKind, SlotPool
from moebound.types import ExpertKey

KIND = SlotKind((("up_proj", (2, 2)), ("down_proj", (2, 2))), torch.float32, False, False, False)
PATIENCE_S = 60
"""Nothing here takes so long; a test fails instead of hanging."""
CATALOG = Catalog.uniform({1: 8}, KIND.n_bytes)


class Recorded(Delivery):
    """Brings the expert's number, in the order asked, when it is let."""

    took_s = 0.0

    def __init__(self, together: int = 1) -> None:
        self.together = together
        self.groups: list[list[int]] = []
        self.began: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing: set[int] = set()

    def workspace(self) -> None:
        return None

    def bytes_of(self, entry: DiskEntry, workspace: Any) -> memoryview:
        raise AssertionError("no shared parts here")

    def bring(self, arrivals: Sequence[Arrival], workspace: Any) -> None:
        group = [arrival.entry.key.expert for arrival in arrivals]
        self.groups.append(group)
        self.began += group
        assert self.gate.wait(10)
        for arrival in arrivals:
            if arrival.entry.key.expert in self.failing:
                raise CorruptionError("spoiled")
            arrival.slot.down.fill_(arrival.entry.key.expert)
            arrival.load.read = clock()
            arrival.load.done = arrival.load.read + self.took_s


def start(
    delivery: Delivery, *, budget: int = 8, n_threads: int = 2
) -> tuple[ExpertCache[Held], Loader]:
    cache = ExpertCache[Held](CATALOG, budget * KIND.n_bytes, working=2)
    entries = {key: DiskEntry(key, (), ()) for key in CATALOG.keys}
    pool = SlotPool(budget * KIND.n_bytes, torch.device("cpu"), [KIND])
    kinds = dict.fromkeys(CATALOG.keys, KIND)
    return cache, Loader(cache, entries, kinds, delivery, pool, Meter(), n_threads=n_threads)


def end(cache: ExpertCache[Held], loader: Loader) -> None:
    cache.close()
    loader.close()


def keys(*experts: int) -> list[ExpertKey]:
    return [ExpertKey(1, expert) for expert in experts]


def wait_until(condition: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_in_the_order_asked_demand_before_guesses() -> None:
    delivery = Recorded()
    delivery.gate.clear()
    cache, loader = start(delivery, n_threads=1)
    loader.expect(keys(0))
    wait_until(lambda: delivery.began == [0])
    loader.expect(keys(6, 7))
    cache.visit(1, [5, 3, 4])
    orders = loader.demand(keys(5, 3, 4))
    delivery.gate.set()
    for order in orders:
        slot = order.arrived.result(PATIENCE_S)
        assert isinstance(slot, Slot)
        assert slot.down.flatten().tolist() == [order.key.expert] * 4
    wait_until(lambda: ExpertKey(1, 7) in cache)
    assert delivery.began == [0, 5, 3, 4, 6, 7]
    end(cache, loader)


def test_new_guesses_replace_old_ones() -> None:
    delivery = Recorded()
    delivery.gate.clear()
    cache, loader = start(delivery, n_threads=1)
    loader.expect(keys(0))
    wait_until(lambda: delivery.began == [0])
    loader.expect(keys(1, 2))
    loader.expect(keys(3))
    delivery.gate.set()
    wait_until(lambda: ExpertKey(1, 3) in cache)
    assert delivery.began == [0, 3]
    end(cache, loader)


def test_more_than_fit_stream_through() -> None:
    """Room for two: the third comes when the first has been released, whatever the threads do."""
    cache, loader = start(Recorded(), budget=2, n_threads=3)
    cache.visit(1, list(range(8)))
    for order in loader.demand(keys(*range(8))):
        slot = order.arrived.result(PATIENCE_S)
        assert isinstance(slot, Slot)
        assert slot.down[0, 0] == order.key.expert
        cache.release([order.key])
    assert loader.pool_bytes <= 2 * KIND.n_bytes
    end(cache, loader)


def test_an_error_is_the_orders_and_nothing_else_suffers() -> None:
    delivery = Recorded()
    delivery.failing.add(3)
    cache, loader = start(delivery, budget=2)
    cache.visit(1, [3, 4])
    bad, good = loader.demand(keys(3, 4))
    with pytest.raises(CorruptionError, match="spoiled"):
        bad.arrived.result(PATIENCE_S)
    assert good.arrived.result(PATIENCE_S) is not None
    cache.release(keys(3, 4))
    delivery.failing.clear()
    cache.visit(1, [3])
    (again,) = loader.demand(keys(3))
    assert again.arrived.result(PATIENCE_S) is not None
    assert loader.pool_bytes <= 2 * KIND.n_bytes  # the failed one's memory was used again
    end(cache, loader)


def test_what_is_there_is_not_loaded_again() -> None:
    cache, loader = start(Recorded())
    cache.visit(1, [2])
    (first,) = loader.demand(keys(2))
    assert first.arrived.result(PATIENCE_S) is not None
    (second,) = loader.demand(keys(2))
    assert second.arrived.result(PATIENCE_S) is None
    end(cache, loader)


def test_cancelled_orders_are_passed_over() -> None:
    delivery = Recorded()
    delivery.gate.clear()
    cache, loader = start(delivery, n_threads=1)
    cache.visit(1, [0, 1, 2])
    orders = loader.demand(keys(0, 1, 2))
    wait_until(lambda: delivery.began == [0])
    loader.cancel(orders[1:2])
    delivery.gate.set()
    assert orders[2].arrived.result(PATIENCE_S) is not None
    with pytest.raises(CancelledError):
        orders[1].arrived.result(PATIENCE_S)
    assert delivery.began == [0, 2]
    end(cache, loader)


def test_closing_ends_threads_that_wait_for_room(tmp_path: Path) -> None:
    cache, loader = start(Recorded(), budget=2, n_threads=2)
    cache.visit(1, [0, 1, 2])
    orders = loader.demand(keys(0, 1, 2))
    orders[1].arrived.result(PATIENCE_S)
    time.sleep(0.05)  # a thread is asleep now, waiting for what is never released
    with ThreadPoolExecutor(1) as pool:
        pool.submit(end, cache, loader).result(PATIENCE_S)
    with pytest.raises((CacheError, CancelledError)):
        orders[2].arrived.result(PATIENCE_S)


def test_what_waits_comes_together_as_far_as_there_is_room() -> None:
    """Room for four, one of it taken: then three at a time, then what releases make room for."""
    delivery = Recorded(together=3)
    delivery.gate.clear()
    cache, loader = start(delivery, budget=4, n_threads=1)
    loader.expect(keys(7))
    wait_until(lambda: delivery.began == [7])  # a guess comes alone
    found = cache.visit(1, [5, 3, 4, 6, 7, 0])
    orders = loader.demand(found.missing)
    delivery.gate.set()
    for order in orders:
        slot = order.arrived.result(PATIENCE_S)
        slot = cache.wait(order.key) if slot is None else slot
        assert isinstance(slot, Slot)
        assert slot.down.flatten().tolist() == [order.key.expert] * 4
        if order.key.expert == 4:
            assert delivery.groups == [[7], [5, 3, 4]]
            cache.release(keys(5, 3, 4))
        elif order.key.expert in (6, 7, 0):
            cache.release([order.key])
    assert loader.pool_bytes <= 4 * KIND.n_bytes
    end(cache, loader)


def test_what_comes_together_takes_its_time_once() -> None:
    delivery = Recorded(together=4)
    delivery.took_s = 1000.0
    delivery.gate.clear()
    cache, loader = start(delivery, n_threads=1)
    loader.expect(keys(7))
    wait_until(lambda: delivery.began == [7])
    cache.visit(1, [0, 1, 2, 3])
    orders = loader.demand(keys(0, 1, 2, 3))
    delivery.gate.set()
    assert all(order.arrived.result(PATIENCE_S) for order in orders)
    assert delivery.groups == [[7], [0, 1, 2, 3]]
    assert loader._meter.decode_s == pytest.approx(2 * 1000.0, rel=0.01)
    end(cache, loader)


def test_one_bad_expert_does_not_spoil_those_that_come_with_it() -> None:
    delivery = Recorded(together=4)
    delivery.failing.add(3)
    delivery.gate.clear()
    cache, loader = start(delivery, budget=4, n_threads=1)
    cache.visit(1, [2, 3, 4])
    orders = loader.demand(keys(2, 3, 4))
    delivery.gate.set()
    assert [order.arrived.exception(10) is None for order in orders] == [True, False, True]
    assert delivery.groups == [[2, 3, 4], [2], [3], [4]]
    for order in (orders[0], orders[2]):
        slot = order.arrived.result()
        assert isinstance(slot, Slot)
        assert slot.down.flatten().tolist() == [order.key.expert] * 4
    cache.release(keys(2, 3, 4))
    delivery.failing.clear()
    cache.visit(1, [3, 5, 6])
    assert all(order.arrived.result(PATIENCE_S) for order in loader.demand(keys(3, 5, 6)))
    assert loader.pool_bytes <= 4 * KIND.n_bytes  # no slot is lost, none is in two hands
    end(cache, loader)


@given(st.data())
@settings(max_examples=15)
def test_any_visits_end_whatever_comes_together(data: st.DataObject) -> None:
    together, budget = data.draw(st.integers(1, 5)), data.draw(st.integers(3, 8))
    delivery = Recorded(together)
    cache, loader = start(delivery, budget=budget, n_threads=data.draw(st.integers(1, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        wanted = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
        found = cache.visit(1, wanted)
        orders = loader.demand(found.missing)
        for key, slot in found.hits.items():
            assert isinstance(slot, Slot)
            assert slot.down[0, 0] == key.expert
            cache.release([key])
        for order in orders:
            arrived = order.arrived.result(PATIENCE_S)
            arrived = cache.wait(order.key) if arrived is None else arrived
            assert isinstance(arrived, Slot)
            assert arrived.down[0, 0] == order.key.expert
            cache.release([order.key])
    assert all(len(group) <= together for group in delivery.groups)
    assert loader.pool_bytes <= budget * KIND.n_bytes
    end(cache, loader)
