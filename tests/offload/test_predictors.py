"""Predictors, and when they are switched off."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from moebound.cache import Catalog, ExpertCache
from moebound.errors import CacheError
from moebound.offload.meter import Meter
from moebound.offload.predictors import (
    ActivationMatching,
    Foresight,
    GateAhead,
    Layers,
    Predictor,
    PreviousToken,
)
from moebound.offload.predictors.foresight import PAUSE_VISITS, TRIAL_VISITS
from moebound.offload.slots import Slot
from moebound.types import ExpertKey

X = torch.ones(1, 4)


def layers(n: int = 3, n_experts: int = 8) -> Layers:
    order = tuple(range(1, n + 1))
    routers = {layer: lambda x, layer=layer: torch.tensor([[layer, 0]]) for layer in order}
    return Layers(order, dict.fromkeys(order, n_experts), 2, routers)


def started(predictor: Predictor) -> Predictor:
    predictor.begin(layers())
    return predictor


class TestPrevious:
    def test_says_what_was(self) -> None:
        predictor = started(PreviousToken())
        assert list(predictor.guess(1, X, 2)) == []
        predictor.observe(2, [5, 3])
        assert list(predictor.guess(1, X, 2)) == [5, 3]
        predictor.begin_sequence()
        assert list(predictor.guess(1, X, 2)) == []


class TestGate:
    def test_asks_the_next_router(self) -> None:
        predictor = started(GateAhead())
        assert list(predictor.guess(1, X, 2)) == [2, 0]
        assert list(predictor.guess(3, X, 1)) == []  # the next token's input is not there yet

    def test_needs_routers(self) -> None:
        with pytest.raises(CacheError, match="routers"):
            GateAhead().begin(Layers((1,), {1: 4}, 2, {}))


class TestMatching:
    def test_finds_the_text_that_went_the_same_way(self) -> None:
        predictor = started(ActivationMatching())
        for experts in ([0, 1], [6, 7]):
            predictor.begin_sequence()
            for layer in (1, 2, 3):
                predictor.observe(layer, experts)
        predictor.begin_sequence()
        assert list(predictor.guess(1, X, 2)) == []  # nothing is known of this text
        for layer in (1, 2, 3):
            predictor.observe(layer, [6, 2])
        assert sorted(predictor.guess(1, X, 2)) == [6, 7]


class Fixed(Predictor):
    name = "fixed"

    def __init__(self, experts: list[int]) -> None:
        self.experts = experts

    def guess(self, layer: int, x: torch.Tensor, coming: int) -> list[int]:
        return self.experts


def foresight(predictor: Predictor | None, meter: Meter) -> tuple[Foresight, list[ExpertKey]]:
    found = layers()
    catalog = Catalog.uniform(dict.fromkeys(found.order, 8), 10)
    cache = ExpertCache[Slot](catalog, catalog.total_bytes, working=3)
    asked: list[ExpertKey] = []

    def expect(keys: Iterable[ExpertKey]) -> None:
        asked.extend(keys)

    return Foresight(predictor, found, cache, meter, expect), asked


def busy(meter: Meter, *, load_s: float, step_s: float) -> None:
    meter.add(loads=100, read_s=100 * load_s, steps=100, step_s=100 * step_s)


class TestForesight:
    def test_guesses_become_orders_for_the_next_layer(self) -> None:
        meter = Meter()
        ahead, asked = foresight(Fixed([4, 5]), meter)
        ahead.look(1, [0, 1], X)
        assert asked == [ExpertKey(2, 4), ExpertKey(2, 5)]
        ahead.look(2, [4, 0], X)
        assert (meter.predicted, meter.predicted_right) == (2, 1)
        ahead.look(3, [0, 1], X)
        assert asked[-1] == ExpertKey(1, 5)  # behind the last layer, the first of the next token

    def test_without_a_predictor_nothing_happens(self) -> None:
        ahead, asked = foresight(None, Meter())
        ahead.look(1, [0, 1], X)
        ahead.begin_sequence()
        assert not asked
        assert not ahead.active

    @pytest.mark.parametrize(
        ("experts", "load_s", "step_s", "goes_on"),
        [
            ([0, 1], 1.0, 1.0, True),  # always right
            ([6, 7], 1.0, 1.0, False),  # never right
            ([0, 7], 1.0, 0.01, False),  # half of it is right, and the link is busy anyway
            ([0, 7], 0.01, 30.0, True),  # half of it is right, and the link is idle
        ],
    )
    def test_goes_on_while_it_pays(
        self, experts: list[int], load_s: float, step_s: float, goes_on: bool
    ) -> None:
        meter = Meter()
        ahead, asked = foresight(Fixed(experts), meter)
        busy(meter, load_s=load_s, step_s=step_s)
        for visit in range(TRIAL_VISITS):
            ahead.look(visit % 3 + 1, [0, 1], X)
        assert ahead.active is goes_on
        n_asked = len(asked)
        for visit in range(TRIAL_VISITS):
            ahead.look((visit + TRIAL_VISITS) % 3 + 1, [0, 1], X)
        assert (len(asked) > n_asked) is goes_on

    def test_is_tried_again(self) -> None:
        meter = Meter()
        ahead, _ = foresight(Fixed([6, 7]), meter)
        busy(meter, load_s=1.0, step_s=1.0)
        for visit in range(PAUSE_VISITS):
            ahead.look(visit % 3 + 1, [0, 1], X)
        assert ahead.active
