"""A predictor at work: its guesses become orders for the loader, as long as that pays.

A guess that is right saves a part of a miss; a wrong one takes the link from experts that are
needed. With recall p, precision q, m misses a layer of f seconds each, and T seconds a layer in
which nothing waits, prefetching pays only if q > p·m·f / (p·m·f + T): where the link is busy all
the time anyway, guesses must be nearly always right. Both sides are measured as the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from moebound.cache import ExpertCache
from moebound.offload.meter import Meter
from moebound.offload.predictors.base import Layers, Predictor
from moebound.types import ExpertKey

TRIAL_VISITS = 256
"""Visits between two decisions whether to go on."""

PAUSE_VISITS = 16 * TRIAL_VISITS
"""After which a predictor that was switched off is tried again."""


class Foresight:
    """predictor: None for none. expect: what takes the orders."""

    def __init__(
        self,
        predictor: Predictor | None,
        layers: Layers,
        cache: ExpertCache[Any],
        meter: Meter,
        expect: Callable[[Iterable[ExpertKey]], None],
    ) -> None:
        self._predictor, self._layers = predictor, layers
        self._cache, self._meter, self._expect = cache, meter, expect
        self.active = predictor is not None
        self._guessed: dict[int, frozenset[int]] = {}
        self._visits = 0
        self._window = np.zeros(4)
        if predictor is not None:
            predictor.begin(layers)

    def begin_sequence(self) -> None:
        self._guessed.clear()
        if self._predictor is not None:
            self._predictor.begin_sequence()

    def look(self, layer: int, chosen: Sequence[int], x: torch.Tensor) -> None:
        """A layer has chosen: settle what was guessed for it, and guess for the next."""
        if self._predictor is None:
            return
        self._predictor.observe(layer, chosen)
        self._settle(layer, chosen)
        order = self._layers.order
        coming = order[(order.index(layer) + 1) % len(order)]
        if not self.active:
            return
        keys = [ExpertKey(coming, e) for e in self._predictor.guess(layer, x, coming)]
        absent = [key for key in keys if key not in self._cache]
        self._guessed[coming] = frozenset(key.expert for key in absent)
        self._expect(absent)

    def _settle(self, layer: int, chosen: Sequence[int]) -> None:
        absent = self._guessed.pop(layer, frozenset[int]())
        right = absent.intersection(chosen)
        self._meter.add(predicted=len(absent), predicted_right=len(right))
        missing = sum(ExpertKey(layer, expert) not in self._cache for expert in chosen)
        # guesses that moved something, those that were right, misses that were left, visits
        self._window += (len(absent), len(right), missing, 1)
        self._visits += 1
        if self._visits % TRIAL_VISITS == 0:
            self._decide()

    def _decide(self) -> None:
        if not self.active:
            self.active = self._visits % PAUSE_VISITS == 0
            self._window[:] = 0
            return
        guesses, right, missed, visits = self._window
        self._window = np.zeros(4)
        meter = self._meter
        if not guesses or not meter.loads or not meter.steps:
            return
        precision = right / guesses
        misses = (right + missed) / visits
        recall = right / max(1, right + missed)
        load_s = (meter.read_s + meter.decode_s) / meter.loads
        n_layers = max(1, len(self._layers.order))
        busy_s = max(0.0, meter.step_s - sum(meter.stall_s.values())) / meter.steps / n_layers
        loading = recall * misses * load_s
        self.active = bool(precision * (loading + busy_s) > loading)
