"""Each policy against an example worked by hand, and what all of them have in common.

One layer with experts a b c d, room for two, nothing kept: what a policy evicts is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import pytest

from moebound.cache import POLICIES, Catalog, Policy, make_policy
from moebound.cache.policies.activation_aware import EPSILON, ActivationAware
from moebound.cache.policies.greedy_dual import GreedyDual
from moebound.cache.policies.hobbit import Hobbit
from moebound.cache.residency import Residency
from moebound.errors import CacheError

A, B, C, D = range(4)


def small(**sizes: Sequence[int]) -> Catalog:
    catalog = Catalog.uniform({0: 4}, 1)
    return Catalog(catalog.keys, tuple(sizes.get("held", (1,) * 4)),
                   tuple(sizes.get("load", (1,) * 4)))  # fmt: skip


def residents(
    policy: Policy, uses: Sequence[int], catalog: Catalog, budget: int = 2
) -> list[set[int]]:
    """Who is resident after each use, of one expert a step."""
    residency = Residency(catalog, budget, policy, floor=0, working=1)
    found = []
    for step, expert in enumerate(uses):
        policy.use(step, 0, [expert], None, 1)
        if not residency.resident[expert]:
            assert residency.bring([expert], 0) is not None
        found.append({e for e in range(4) if residency.resident[e]})
    return found


def test_lru_evicts_what_was_not_used_longest() -> None:
    # a b, then a again: b is the older one when c comes; then a when d comes.
    assert residents(make_policy("lru"), [A, B, A, C, D], small()) == [
        {A}, {A, B}, {A, B}, {A, C}, {C, D},
    ]  # fmt: skip


def test_lfu_evicts_what_was_used_least_and_remembers() -> None:
    # a 2, b 1: c evicts b. Then c (1) goes for b, whose count goes on: 2. Then a (2, first) goes.
    assert residents(make_policy("lfu"), [A, A, B, C, B, D], small()) == [
        {A}, {A}, {A, B}, {A, C}, {A, B}, {B, D},
    ]  # fmt: skip


def test_lfru_forgets() -> None:
    # After 200 steps, a's 3 uses are worth 3 · 0.25^(200/128) = 0.34, less than b's one.
    recent = [A, A, A, B, C]
    assert residents(make_policy("lfru"), recent, small())[-1] == {A, C}
    policy = make_policy("lfru")
    residency = Residency(small(), 2, policy, floor=0, working=1)
    for step, expert in [(0, A), (1, A), (2, A), (202, B)]:
        policy.use(step, 0, [expert], None, 1)
        if not residency.resident[expert]:
            residency.bring([expert], 0)
    assert exp(policy.value[A] - policy.value[B]) == pytest.approx(3 * 0.25 ** (200 / 128))
    residency.bring([C], 0)
    assert list(residency.resident) == [0, 1, 1, 0]


def test_activation_aware_scores() -> None:
    policy = ActivationAware()
    catalog = Catalog.uniform({0: 2, 1: 2}, 1)
    policy.begin(catalog)
    policy.use(0, 0, [0, 1], [3, 1], 2)
    policy.use(0, 1, [2], [4], 1)
    policy.use(1, 0, [0], None, 1)
    bias = policy.bias(0)

    def score(expert: int) -> float:
        return exp(policy.value[expert] + bias[catalog.place_of[expert]])

    # (a + ε) / A_l · f · (1 - l / 2)
    assert score(0) == pytest.approx((4 + EPSILON) / 5 * 2 * 1)
    assert score(1) == pytest.approx((1 + EPSILON) / 5 * 1 * 1)
    assert score(2) == pytest.approx((4 + EPSILON) / 4 * 1 * 0.5)
    assert policy.begin_sequence()
    assert exp(policy.value[0]) == pytest.approx(EPSILON * 2)
    assert list(policy.bias(0)) == [0, log(0.5)]


def test_activation_aware_keeps_what_the_text_uses() -> None:
    # Ever: a three times, b once. This text has used b only: a goes.
    policy = make_policy("activation-aware")
    residency = Residency(small(), 2, policy, floor=0, working=1)
    for step, expert in enumerate([A, A, A, B]):
        if step == 3:
            residency.begin_sequence()
        policy.use(step, 0, [expert], None, 1)
        if not residency.resident[expert]:
            residency.bring([expert], 0)
    residency.bring([C], 0)
    assert list(residency.resident) == [0, 1, 1, 0]


def test_hobbit_scores() -> None:
    policy = Hobbit((0.4, 0.3, 0.2, 0.1))
    catalog = Catalog.uniform({0: 2, 3: 2, 7: 2}, 1)
    policy.begin(catalog)
    policy.use(5, 0, [0, 1], None, 1)
    policy.use(6, 0, [0], None, 0)
    policy.use(8, 2, [4], None, 1)
    T = 4  # steps 5 to 8

    def score(expert: int, now: int) -> float:
        return (policy.value[expert] + policy.bias(now)[catalog.place_of[expert]]) / T

    # w₁ R/T + w₂ F/T + w₃ H/T + w₄ (1 - distance / 3)
    assert score(0, 2) == pytest.approx(0.4 * 2 / T + 0.3 * 2 / T + 0.2 * 1 / T + 0.1 * (1 - 1 / 3))
    assert score(1, 2) == pytest.approx(0.4 * 1 / T + 0.3 * 1 / T + 0.1 * (1 - 1 / 3))
    assert score(4, 2) == pytest.approx(0.4 + 0.3 / T + 0.2 / T + 0.1)
    assert score(4, 0) == pytest.approx(0.4 + 0.3 / T + 0.2 / T + 0.1 * (1 - 2 / 3))
    policy.begin_sequence()
    policy.use(9, 0, [1], None, 1)
    assert policy.value[1] == pytest.approx(0.4 + 0.3 + 0.2)
    assert policy.value[0] == 0


def test_greedy_dual_keeps_what_is_dear_to_load() -> None:
    # All used as often; b costs three times as much to load: a and c go, b stays.
    catalog = small(load=(1, 3, 1, 1))
    assert residents(GreedyDual(), [A, B, C, D], catalog) == [{A}, {A, B}, {B, C}, {B, D}]


def test_greedy_dual_keeps_small_ones_before_large() -> None:
    # 4 bytes of room, a takes 3 of them, for the same price: it goes first.
    catalog = small(held=(3, 1, 1, 1))
    assert residents(GreedyDual(), [A, B, C], catalog, budget=4)[-1] == {B, C}


def test_greedy_dual_ages() -> None:
    # b was worth three times as much, but every eviction raises the clock past it in the end.
    catalog = small(load=(1, 3, 1, 1))
    held = residents(GreedyDual(), [B, *[A, C, D] * 10], catalog)
    assert B in held[5]
    assert B not in held[-1]


@pytest.mark.parametrize("name", POLICIES)
def test_one_object_serves_one_cache_after_another(name: str) -> None:
    policy = make_policy(name)
    uses = [A, B, A, C, D, A, B, C, A]
    first = residents(policy, uses, small())
    assert residents(policy, uses, small()) == first
    assert policy.name == name


def test_a_policy_that_is_not_known() -> None:
    with pytest.raises(CacheError, match="'fifo': expected one of lru, lfu"):
        make_policy("fifo")
