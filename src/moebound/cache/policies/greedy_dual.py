"""GreedyDual-Size with the odds of reuse: what would it cost to have it away?

    value = clock + P(reuse) · reload cost / bytes held

at every use; the clock is the value of the last one evicted, so what is not used ages without
being touched (Cao & Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997; with a factor of
frequency, Cherkasova, HPL-98-69R1). P(reuse): the expert's share of its layer's visits so far.
Reload cost: the bytes that are moved, so that of two experts that take the same room the one that
compressed worse stays longer. Costs are taken relative to the mean expert's.
"""

from __future__ import annotations

from collections.abc import Sequence

from moebound.cache.catalog import Catalog
from moebound.cache.policies.base import Policy


class GreedyDual(Policy):
    name = "greedy-dual"

    def begin(self, catalog: Catalog) -> None:
        super().begin(catalog)
        costs = [
            load / held for load, held in zip(catalog.load_bytes, catalog.held_bytes, strict=True)
        ]
        mean = sum(costs) / len(costs)
        self._costs = [cost / mean for cost in costs]
        self._uses = [0] * len(catalog)
        self._visits = [0] * len(catalog.layers)
        self._worth = [0.0] * len(catalog)
        self._clock = 0.0

    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        self._visits[place] = visits = self._visits[place] + 1
        value, uses, clock = self.value, self._uses, self._clock
        for expert in experts:
            uses[expert] = count = uses[expert] + 1
            self._worth[expert] = worth = self._costs[expert] * count / visits
            # P(reuse) may have fallen since the last use; a resident is not worth less for a use.
            if clock + worth > value[expert]:
                value[expert] = clock + worth

    def admitted(self, expert: int) -> None:
        self.value[expert] = self._clock + self._worth[expert]

    def evicted(self, expert: int) -> None:
        self._clock = max(self._clock, self.value[expert])
        self.value[expert] = 0.0
