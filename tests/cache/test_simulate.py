"""Replays: counted by hand, within the budget, never better than the limit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.cache import (
    POLICIES,
    Catalog,
    Policy,
    Simulation,
    Trace,
    Visits,
    ZipfTrace,
    choose_policy,
    make_policy,
    simulate,
    uniform,
)
from moebound.cache import residency as residency_module
from moebound.cache.belady import limits
from moebound.cache.simulate import replay
from moebound.errors import CacheError

from .drawn import trace_of, traces


def sized(trace: Trace, rng: np.random.Generator) -> Catalog:
    """The trace's experts, each of its own size and price."""
    keys = uniform(trace, 1).keys
    held, load = rng.integers(1, 20, (2, len(keys))).tolist()
    return Catalog(keys, tuple(held), tuple(load))


def test_lru_by_hand() -> None:
    # Two layers of 3 experts, room for 3. Each step asks one expert of each layer.
    trace = trace_of([[[0], [0]], [[1], [0]], [[1], [2]], [[0], [0]]], 3)
    catalog = uniform(trace, 10)
    found = simulate(trace, catalog, [30], policies=["lru"], floor=0, working=1)
    # a0 b0 | a1 (b0) | (a1) b2, a0 goes | a0, b0 goes: the oldest | b0, a1 goes
    [run] = found.replays
    assert (run.accesses, run.hits, run.moved_bytes, run.evictions) == (8, 2, 60, 3)
    assert [(x.layer, x.accesses, x.hits, x.moved_bytes) for x in run.layers] == [
        (0, 4, 1, 30), (1, 4, 1, 30),
    ]  # fmt: skip
    assert run.hit_ratio == run.decode_hit_ratio == 0.25
    # Knowing the future, a0 and b0 stay, and a1 takes the third place until its last use.
    [limit] = found.limits
    assert (limit.kind, limit.hits, limit.moved_bytes) == ("belady", 4, 40)
    assert limit.share(run) == 0.5


def test_a_prefill_visits_each_expert_once_and_streams() -> None:
    # One step of 3 tokens that use all 4 experts, then a decode step; room for 2.
    trace = trace_of([[[0, 1]], [[2, 3]], [[0, 2]], [[3]]], 4)
    step, decode = np.array([0, 0, 0, 1], np.int32), np.array([False] * 3 + [True])
    prompt = Trace(trace.layers, trace.token, trace.position, trace.sequence, step, decode)
    visits = Visits.of_trace(prompt, uniform(prompt, 1))
    assert list(visits.walk()) == [
        (0, 0, [0, 1, 2, 3], [2, 1, 2, 1], 4, False, True),
        (1, 0, [3], [1], 1, True, False),
    ]  # fmt: skip
    run = replay(visits, make_policy("lru"), 2, floor=0, working=2)
    assert (run.accesses, run.hits, run.moved_bytes, run.evictions) == (5, 1, 4, 2)
    assert (run.decode_accesses, run.decode_hits, run.decode_moved_bytes) == (1, 1, 0)


def test_leading_experts_stand_first() -> None:
    trace = trace_of([[[4, 1, 2]]], 5)
    trace.layers[0].weights[:] = [[0.2, 0.5, 0.3]]
    visits = Visits.of_trace(trace, uniform(trace, 1))
    # Above 2 (0.3) stands 0.5, above 4 (0.2) stands 0.8, which is more than 0.6.
    assert list(visits.walk()) == [(0, 0, [1, 2, 4], None, 2, True, True)]


def test_sequences_begin_where_the_trace_says() -> None:
    trace = trace_of([[[0], [1]]] * 5, 2, new_at=(0, 3))
    fresh = [(step, place) for step, place, *_, new in Visits.of_trace(trace, uniform(trace, 1)).walk() if new]  # noqa: E501  # fmt: skip
    assert fresh == [(0, 0), (3, 0)]


@settings(max_examples=60)
@given(traces(), st.integers(0, 100), st.booleans(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_no_policy_beats_the_limit_or_the_budget(
    trace: Trace, percent: int, equal: bool, floor: int, seed: int
) -> None:
    catalog = uniform(trace, 7) if equal else sized(trace, np.random.default_rng(seed))
    visits = Visits.of_trace(trace, catalog)
    working = visits.top_k + 1
    least = catalog.smallest_budget(floor=floor, working=working)
    budget = least + (catalog.total_bytes - least) * percent // 100
    [limit] = limits(visits, [budget])
    assert limit.planned_hits <= limit.hits + 1e-9 <= limit.accesses + 1e-9
    assert limit.kind == ("belady" if equal else "space-time")
    for name in POLICIES:
        run = replay(visits, Watched(make_policy(name), budget), budget, floor=floor,
                     working=working)  # fmt: skip
        assert run.hits <= limit.hits + 1e-9
        assert run.moved_bytes >= limit.moved_bytes - 1e-6
        assert run.accesses == limit.accesses == visits.n_accesses
        if percent == 100:
            assert run.evictions == 0
            used = np.unique(visits.experts)
            assert run.hits == run.accesses - len(used)
            assert run.moved_bytes == np.array(catalog.load_bytes)[used].sum()


class Watched(Policy):
    """A policy whose cache is checked at every visit: the bytes of its residents, and floors."""

    def __init__(self, inner: Policy, budget: int) -> None:
        self.inner, self.budget = inner, budget
        self.held: set[int] = set()

    def begin(self, catalog: Catalog) -> None:
        self.inner.begin(catalog)
        self.catalog = catalog

    @property
    def value(self) -> list[float]:  # type: ignore[override]
        return self.inner.value

    def use(self, step: int, place: int, experts: Sequence[int], tokens: Any, leading: int) -> None:
        assert 0 <= leading <= len(experts) == len(set(experts))
        assert sum(self.catalog.held_bytes[e] for e in self.held) <= self.budget
        self.inner.use(step, place, experts, tokens, leading)

    def begin_sequence(self) -> bool:
        return self.inner.begin_sequence()

    def bias(self, place: int) -> Sequence[float] | None:
        return self.inner.bias(place)

    def admitted(self, expert: int) -> None:
        self.held.add(expert)
        assert sum(self.catalog.held_bytes[e] for e in self.held) <= self.budget
        self.inner.admitted(expert)

    def evicted(self, expert: int) -> None:
        self.held.remove(expert)
        self.inner.evicted(expert)


Watched.name = "watched"


@settings(max_examples=25)
@given(traces(), st.integers(0, 100))
def test_belady_is_the_optimum(trace: Trace, percent: int) -> None:
    """Against trying everything, on traces short enough for that."""
    short = Trace(
        tuple(type(e)(e.layer, e.n_experts, e.index[:6], e.weights[:6]) for e in trace.layers[:2]),
        *(getattr(trace, f)[:6] for f in ("token", "position", "sequence", "step", "decode")),
    )
    visits = Visits.of_trace(short, uniform(short, 1))
    room = max(1, len(visits.catalog) * percent // 100)
    reachable: dict[frozenset[int], int] = {frozenset(): 0}
    for _, _, experts, *_ in visits.walk():
        following: dict[frozenset[int], int] = {}
        for held, hits in reachable.items():
            union = sorted(held | set(experts))
            total = hits + len(held & set(experts))
            for kept in _subsets(union, room):
                following[kept] = max(following.get(kept, 0), total)
        reachable = following
    assert limits(visits, [room])[0].hits == max(reachable.values())


def _subsets(items: Sequence[int], most: int) -> list[frozenset[int]]:
    """Those of the largest size allowed: keeping less never helps."""
    from itertools import combinations

    return [frozenset(c) for c in combinations(items, min(most, len(items)))]


def test_a_floor_protects_a_layer() -> None:
    # Layer 0 is used once, layer 1 often and by many: without a floor, nothing of layer 0 stays.
    steps = [[[0], [0]]] + [[[], [i % 4]] for i in range(8)] + [[[0], [0]]]
    trace = trace_of(steps, 4)
    catalog = uniform(trace, 1)
    hits = [
        simulate(trace, catalog, [3], policies=["lru"], floor=floor, working=1).replays[0].layers[0]
        for floor in (0, 1)
    ]
    assert [layer.hits for layer in hits] == [0, 1]


def test_json_round_trip_and_processes() -> None:
    trace = ZipfTrace(layers=2, experts=8, top_k=2, tokens=200, sequences=2, prompt=20).draw()
    catalog = uniform(trace, 1000)
    told: list[tuple[int, int, str]] = []
    found = simulate(trace, catalog, [8000, 12000], policies=["lru", "hobbit"],
                     report=lambda *step: told.append(step))  # fmt: skip
    assert [step[0] for step in told] == list(range(1, 7))
    assert told[-1] == (6, 6, "limit 12000")
    document = json.loads(json.dumps(found.to_json()))
    assert document["format"] == "moebound.cache"
    assert Simulation.from_json(document) == found
    assert document["replays"][0]["share_of_limit"] <= 1
    assert simulate(trace, catalog, [8000, 12000], policies=["lru", "hobbit"], jobs=2) == found


def test_choose_policy() -> None:
    trace = ZipfTrace(layers=3, experts=16, top_k=2, tokens=400, sequences=2, prompt=20).draw()
    catalog = uniform(trace, 1000)
    choice = choose_policy(trace, catalog, 16000)
    found = simulate(trace, catalog, [16000])
    assert choice.policy == found.best(16000).policy
    assert choice.replay.moved_bytes == min(run.moved_bytes for run in found.replays)
    assert choice.margin >= 1
    assert choice.limit.share(choice.replay) <= 1


def test_what_cannot_be_simulated() -> None:
    trace = trace_of([[[0, 1], [1, 2]]], 4)
    catalog = uniform(trace, 100)
    with pytest.raises(CacheError, match=r"the smallest budget is 400 bytes \(50.0 % of all"):
        simulate(trace, catalog, [399])
    assert simulate(trace, catalog, [400]).replays[0].hits == 0
    with pytest.raises(CacheError, match="nothing to simulate"):
        simulate(trace, catalog, [])
    with pytest.raises(CacheError, match="'mru'"):
        simulate(trace, catalog, [400], policies=["mru"])
    with pytest.raises(CacheError, match="layer 1 expert 2: chosen in the trace"):
        simulate(trace, Catalog.uniform({0: 4, 1: 2}, 1), [4])
    with pytest.raises(CacheError, match="layer 1 expert 1: chosen in the trace"):
        simulate(trace, Catalog.uniform({0: 4}, 1), [4])
    with pytest.raises(CacheError, match="no experts are chosen"):
        simulate(trace_of([[[], [-1]]], 4), catalog, [400])


def test_a_heap_is_put_right_after_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain rule: the lowest value of all that may go, found by looking at each."""

    class Plain(residency_module.Residency):
        def make_room(self, need_bytes: int, place: int, *, keep: Any = None) -> list[int] | None:
            gone = []
            while need_bytes > self.free_bytes:
                bias = self.policy.bias(place)
                may = [
                    (self.policy.value[e] + (bias[p] if bias else 0), p, e)
                    for e, p in enumerate(self.catalog.place_of)
                    if self.resident[e] and not self.pins[e]
                    and (p == place or self.counts[p] > self.floor)
                ]  # fmt: skip
                if not may:
                    return None
                _, p, e = min(may)
                self.resident[e] = 0
                self.counts[p] -= 1
                self.free_bytes += self.catalog.held_bytes[e]
                self._heaps[p] = [entry for entry in self._heaps[p] if entry[1] != e]
                self._settle(p)
                self.policy.evicted(e)
                gone.append(e)
            return gone

    trace = ZipfTrace(layers=4, experts=12, top_k=3, tokens=300, sequences=3, prompt=30).draw()
    catalog = sized(trace, np.random.default_rng(0))
    budget = catalog.smallest_budget(floor=2, working=4) + 20
    found = simulate(trace, catalog, [budget], floor=2)
    monkeypatch.setattr(sys.modules["moebound.cache.simulate"], "Residency", Plain)
    assert simulate(trace, catalog, [budget], floor=2) == found
