"""The live cache: pins, budgets, failures, and many threads at once."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.cache import POLICIES, Catalog, Claim, ExpertCache
from moebound.errors import CacheError
from moebound.types import ExpertKey

PATIENCE_S = 60
"""Nothing here takes so long; a test fails instead of hanging."""


def make(
    n_layers: int = 2, n_experts: int = 4, *, budget: int = 4, working: int = 2, **options: Any
) -> ExpertCache[str]:
    catalog = Catalog.uniform(dict.fromkeys(range(n_layers), n_experts), 1)
    return ExpertCache(catalog, budget, working=working, **options)


def load(cache: ExpertCache[str], layer: int, *experts: int) -> None:
    """One visit, as a runtime without threads makes it."""
    found = cache.visit(layer, experts)
    for key in found.missing:
        claim = cache.claim(key, timeout=0)
        assert claim is not None
        with claim:
            claim.fill(str(key))
        assert cache.wait(key, timeout=0) == str(key)
    for key, value in found.hits.items():
        assert value == str(key)
    cache.release(found.keys)


def resident(cache: ExpertCache[str]) -> set[tuple[int, int]]:
    return {(key.layer, key.expert) for key in cache.catalog.keys if key in cache}


def test_visits_hit_what_was_loaded() -> None:
    cache = make(budget=3)
    for layer, expert in [(0, 0), (1, 0), (0, 1), (1, 0), (0, 2)]:
        load(cache, layer, expert)
    assert resident(cache) == {(1, 0), (0, 1), (0, 2)}
    stats = cache.stats
    assert (stats.accesses, stats.hits, stats.loads, stats.evictions) == (5, 1, 4, 1)
    assert stats.moved_bytes == 4
    assert cache.used_bytes == 3


def test_a_budget_below_the_floor_names_the_smallest() -> None:
    with pytest.raises(CacheError, match=r"budget 4 bytes: .* the smallest budget is 5 bytes"):
        make(3, budget=4, working=3)
    make(3, budget=5, working=3)


def test_pinned_experts_stay() -> None:
    cache = make(budget=3, floor=0)
    load(cache, 0, 0)
    pinned = cache.visit(0, [0])
    for expert in (1, 2, 3, 1, 2, 3):
        load(cache, 1, expert)
        assert ExpertKey(0, 0) in cache
    cache.release(pinned.keys)
    load(cache, 1, 0)
    load(cache, 1, 1)
    assert ExpertKey(0, 0) not in cache


def test_an_expert_in_flight_is_loaded_once_and_cannot_be_evicted() -> None:
    cache = make(budget=2, floor=0, working=1)
    key = ExpertKey(0, 0)
    found = cache.visit(0, [0])
    claim = cache.claim(key)
    assert claim is not None
    assert cache.claim(key) is None
    assert key not in cache
    load(cache, 1, 0)
    load(cache, 1, 1)
    assert cache.used_bytes == 2
    claim.fill("it")
    assert cache.claim(key) is None
    load(cache, 1, 2)
    assert cache.wait(key, timeout=0) == "it"
    cache.release(found.keys)
    with pytest.raises(CacheError, match="layer 0 expert 0: filled or abandoned before"):
        claim.fill("again")


def test_evicted_values_come_with_the_claim() -> None:
    cache = make(budget=1, floor=0, working=1)
    load(cache, 0, 3)
    cache.visit(1, [2])
    claim = cache.claim(ExpertKey(1, 2))
    assert claim is not None
    assert claim.evicted == ((ExpertKey(0, 3), "layer 0 expert 3"),)


def test_a_claim_waits_for_room_and_says_why_there_is_none() -> None:
    cache = make(budget=2, floor=0)
    load(cache, 0, 0, 1)
    pinned = cache.visit(0, [0, 1])
    cache.visit(1, [0])
    with pytest.raises(CacheError, match=r"layer 1 expert 0: no room .* of 2 bytes, 2 are pinned"):
        cache.claim(ExpertKey(1, 0), timeout=0.01)
    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(cache.claim, ExpertKey(1, 0), timeout=PATIENCE_S)
        time.sleep(0.05)
        assert not claim.done()
        cache.release(pinned.keys[:1])
        assert claim.result(PATIENCE_S) is not None
    assert resident(cache) == {(0, 1)}


def test_a_failed_load_reaches_those_who_wait_and_gives_the_room_back() -> None:
    cache = make(budget=2, floor=0)
    key = ExpertKey(0, 0)
    found = cache.visit(0, [0])
    claim = cache.claim(key)
    assert claim is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.wait, key, timeout=PATIENCE_S)
        with pytest.raises(OSError, match="disk"), claim:
            raise OSError("disk")
        error = waiting.exception(PATIENCE_S)
    assert isinstance(error, CacheError)
    assert str(error) == "layer 0 expert 0: could not be loaded"
    assert isinstance(error.__cause__, OSError)
    assert cache.used_bytes == 0
    with pytest.raises(CacheError, match="could not be loaded"):
        cache.obtain(key)
    again = cache.claim(key)  # whoever claims it anew starts afresh
    assert again is not None
    again.fill("it")
    assert cache.obtain(key) == "it"
    cache.release(found.keys)


def test_obtain_takes_over_what_a_predictor_gave_up() -> None:
    cache = make()
    key = ExpertKey(1, 1)
    guess = cache.claim(key, speculative=True)
    assert guess is not None
    cache.visit(1, [1])
    guess.abandon()
    with pytest.raises(CacheError, match="nobody is loading it"):
        cache.wait(key)
    claim = cache.obtain(key)
    assert isinstance(claim, Claim)
    claim.fill("it")
    assert cache.obtain(key) == cache.wait(key) == "it"


def test_a_speculative_claim_evicts_nothing_that_is_alive() -> None:
    cache = make(budget=2, floor=0, working=1)
    load(cache, 0, 0)
    load(cache, 1, 0)
    assert cache.claim(ExpertKey(1, 1), speculative=True) is None
    for _ in range(2):
        load(cache, 0, 0)
    assert resident(cache) == {(0, 0), (1, 0)}
    claim = cache.claim(ExpertKey(1, 1), speculative=True)
    assert claim is not None
    assert claim.evicted[0][0] == ExpertKey(1, 0)  # not used for two steps
    claim.fill("guess")
    assert cache.stats.speculative == 1
    assert cache.visit(1, [1]).hits == {ExpertKey(1, 1): "guess"}


def test_wrong_use_is_named() -> None:
    cache = make()
    with pytest.raises(CacheError, match=r"layer 5: expected one of \[0, 1\]"):
        cache.visit(5, [0])
    with pytest.raises(CacheError, match="layer 0 expert 9: not among the 8 experts"):
        cache.visit(0, [9])
    with pytest.raises(CacheError, match="twice"):
        cache.visit(0, [1, 1])
    with pytest.raises(CacheError, match="layer 0 expert 0: waited for, and not pinned"):
        cache.wait(ExpertKey(0, 0))
    with pytest.raises(CacheError, match="layer 0 expert 1: released, and was not pinned"):
        cache.release([ExpertKey(0, 1)])


def test_closing_wakes_everybody() -> None:
    cache = make(budget=2, floor=0)
    found = cache.visit(0, [0, 1])
    claims = [cache.claim(key) for key in found.missing]
    cache.visit(1, [0])
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(cache.wait, ExpertKey(0, 0), timeout=PATIENCE_S)
        claiming = pool.submit(cache.claim, ExpertKey(1, 0), timeout=PATIENCE_S)
        time.sleep(0.05)
        cache.close()
        for sleeper in (waiting, claiming):
            with pytest.raises(CacheError, match="closed"):
                sleeper.result(PATIENCE_S)
    assert claims[0] is not None
    claims[0].fill("late")  # comes to nothing, and harms nobody
    assert not resident(cache)


@settings(max_examples=50)
@given(st.data(), st.sampled_from(sorted(POLICIES)), st.integers(0, 2))
def test_any_order_of_visits_finds_room(data: st.DataObject, policy: str, floor: int) -> None:
    held = data.draw(st.lists(st.integers(1, 9), min_size=12, max_size=12))
    keys = Catalog.uniform(dict.fromkeys(range(3), 4), 1).keys
    catalog = Catalog(keys, tuple(held), tuple(held))
    budget = catalog.smallest_budget(floor=floor, working=3)
    cache: ExpertCache[str] = ExpertCache(catalog, budget, policy=policy, floor=floor, working=3)
    counts = [0, 0, 0]
    for layer in data.draw(st.lists(st.integers(0, 2), max_size=30)):
        experts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
        if data.draw(st.booleans()):
            cache.begin_sequence()
        load(cache, layer, *experts)
        now = [sum(key.layer == at for key in catalog.keys if key in cache) for at in range(3)]
        for at in range(3):
            assert at == layer or now[at] >= min(counts[at], floor)
        counts = now
        assert cache.used_bytes == sum(h for k, h in zip(keys, held, strict=True) if k in cache)
        assert cache.used_bytes <= budget


@pytest.mark.parametrize("policy", POLICIES)
def test_many_threads(policy: str) -> None:
    """Two texts and a predictor at once, loads that fail now and then: nothing hangs, no expert is
    another's, no byte too many, and all is unpinned in the end."""
    n_layers, n_experts, k = 4, 10, 3
    cache = make(n_layers, n_experts, budget=14, working=2 * k, policy=policy)
    wrong, done = list[str](), threading.Event()

    def fetch(key: ExpertKey, rng: random.Random) -> str:
        if rng.random() < 0.3:
            time.sleep(0.0002)
        if rng.random() < 0.02:
            raise OSError("disk")
        return str(key)

    def text(seed: int) -> int:
        rng, failures = random.Random(seed), 0
        for step in range(40):
            for layer in range(n_layers):
                found = cache.visit(layer, rng.sample(range(n_experts), k))
                try:
                    for key in found.missing:
                        got = cache.obtain(key, timeout=PATIENCE_S)
                        if isinstance(got, Claim):
                            with got:
                                got.fill(fetch(key, rng))
                            got = cache.wait(key, timeout=PATIENCE_S)
                        if got != str(key):
                            wrong.append(f"{key}: {got}")
                    wrong.extend(f"{k}: {v}" for k, v in found.hits.items() if v != str(k))
                except (OSError, CacheError) as error:
                    failures += 1
                    if "disk" not in str(error) and "could not be loaded" not in str(error):
                        raise
                finally:
                    cache.release(found.keys)
                if cache.used_bytes > cache.budget_bytes:
                    wrong.append("over budget")
            if step % 10 == 9:
                cache.begin_sequence()
        return failures

    def predict() -> None:
        rng = random.Random(99)
        while not done.is_set():
            claim = cache.claim(rng.choice(cache.catalog.keys), speculative=True)
            if claim is not None:
                if rng.random() < 0.3:
                    claim.abandon()
                else:
                    claim.fill(str(claim.key))
            time.sleep(0.0005)

    with ThreadPoolExecutor(3) as pool:
        predictor = pool.submit(predict)
        texts = [pool.submit(text, seed) for seed in (1, 2)]
        try:
            for running in texts:
                running.result(5 * PATIENCE_S)
        finally:
            done.set()
        predictor.result(PATIENCE_S)
    assert not wrong
    stats = cache.stats
    assert stats.accesses == 2 * 40 * n_layers * k
    assert 0 < stats.loads < stats.accesses
    everything = [cache.visit(0, [e]) for e in range(2)]
    for found in everything:
        cache.release(found.keys)
    with pytest.raises(CacheError, match="was not pinned"):
        cache.release(everything[0].keys)
