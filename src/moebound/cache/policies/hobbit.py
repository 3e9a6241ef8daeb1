"""HOBBIT's weighted score (2411.01433): recent, frequent, important, and soon needed.

The lowest goes of

    w₁ · R / T  +  w₂ · F / T  +  w₃ · H / T  +  w₄ · (1 - ((l - l_now) mod L) / L)

R: the step of its last use, F: its uses, H: its uses in high precision (those whose share of the
gate, after all larger ones, is within the first 0.6: see `visits`), all counted from the start of
the sequence; T: steps of the sequence so far; l: its layer's place among L, l_now the one at work.

All four weigh alike by default. Ranks stay as they are when all scores are multiplied by T:
value = w₁R + w₂F + w₃H, bias of a layer = T · w₄ · (...).
"""

from __future__ import annotations

from collections.abc import Sequence

from moebound.cache.catalog import Catalog
from moebound.cache.policies.base import Policy


class Hobbit(Policy):
    """weights: w₁ to w₄ above."""

    name = "hobbit"

    def __init__(self, weights: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)):
        self._recent, self._frequent, self._precise, self._near = weights

    def begin(self, catalog: Catalog) -> None:
        super().begin(catalog)
        self._counts = [0.0] * len(catalog)
        self._first: int | None = None
        self._steps = 1
        n = len(catalog.layers)
        self._nearness = [
            [self._near * (1 - ((layer - now) % n) / n) for layer in range(n)] for now in range(n)
        ]

    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        if self._first is None:
            self._first = step
        self._steps = steps = step - self._first + 1
        value, counts, recent = self.value, self._counts, self._recent * steps
        precise = self._frequent + self._precise
        for expert in experts[:leading]:
            counts[expert] = count = counts[expert] + precise
            value[expert] = recent + count
        for expert in experts[leading:]:
            counts[expert] = count = counts[expert] + self._frequent
            value[expert] = recent + count

    def begin_sequence(self) -> bool:
        self._counts = [0.0] * len(self._counts)
        self.value = [0.0] * len(self.value)
        self._first = None
        return True

    def bias(self, place: int) -> Sequence[float]:
        steps = self._steps
        return [steps * near for near in self._nearness[place]]
