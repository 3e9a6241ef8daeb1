"""Loading threads: order, room, errors, and the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.cache import Catalog, ExpertCache
from moebound.errors import CacheError, CorruptionError
from moebound.runtime.delivery import Delivery
from moebound.runtime.images import Image
from moebound.runtime.loader import Loader
from moebound.runtime.meter import Load, Meter, clock
from moebound.runtime.slots import Kind, Slot, SlotPool
from moebound.types import ExpertKey

KIND = Kind((("up_proj", (2, 2)), ("down_proj", (2, 2))), torch.float32, False, False, False)
CATALOG = Catalog.uniform({1: 8}, KIND.n_bytes)


class Recorded(Delivery):
    """Brings the expert's number, in the order asked, when it is let."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing: set[int] = set()

    def workspace(self) -> None:
        return None

    def bring(self, image: Image, slot: Slot, load: Load, workspace: Any) -> None:
        self.began.append(image.key.expert)
        assert self.gate.wait(10)
        if image.key.expert in self.failing:
            raise CorruptionError("spoiled")
        slot.down.fill_(image.key.expert)
        load.read = load.done = clock()


def start(
    delivery: Delivery, *, budget: int = 8, n_threads: int = 2
) -> tuple[ExpertCache[Slot], Loader]:
    cache = ExpertCache[Slot](CATALOG, budget * KIND.n_bytes, working=2)
    images = {key: Image(key, (), ()) for key in CATALOG.keys}
    pool = SlotPool(budget * KIND.n_bytes, torch.device("cpu"), [KIND])
    kinds = dict.fromkeys(CATALOG.keys, KIND)
    return cache, Loader(cache, images, kinds, delivery, pool, Meter(), n_threads=n_threads)


def end(cache: ExpertCache[Slot], loader: Loader) -> None:
    cache.close()
    loader.close()


def keys(*experts: int) -> list[ExpertKey]:
    return [ExpertKey(1, expert) for expert in experts]


def wait_until(condition: Any) -> None:
    until = time.monotonic() + 10
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
        slot = order.arrived.result(10)
        assert slot is not None
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
        slot = order.arrived.result(10)
        assert slot is not None
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
        bad.arrived.result(10)
    assert good.arrived.result(10) is not None
    cache.release(keys(3, 4))
    delivery.failing.clear()
    cache.visit(1, [3])
    (again,) = loader.demand(keys(3))
    assert again.arrived.result(10) is not None
    assert loader.pool_bytes <= 2 * KIND.n_bytes  # the failed one's memory was used again
    end(cache, loader)


def test_what_is_there_is_not_loaded_again() -> None:
    cache, loader = start(Recorded())
    cache.visit(1, [2])
    (first,) = loader.demand(keys(2))
    assert first.arrived.result(10) is not None
    (second,) = loader.demand(keys(2))
    assert second.arrived.result(10) is None
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
    assert orders[2].arrived.result(10) is not None
    with pytest.raises(CancelledError):
        orders[1].arrived.result(10)
    assert delivery.began == [0, 2]
    end(cache, loader)


def test_closing_ends_threads_that_wait_for_room(tmp_path: Path) -> None:
    cache, loader = start(Recorded(), budget=2, n_threads=2)
    cache.visit(1, [0, 1, 2])
    orders = loader.demand(keys(0, 1, 2))
    orders[1].arrived.result(10)
    time.sleep(0.05)  # a thread is asleep now, waiting for what is never released
    begun = time.monotonic()
    end(cache, loader)
    assert time.monotonic() - begun < 10
    with pytest.raises((CacheError, CancelledError)):
        orders[2].arrived.result(10)
