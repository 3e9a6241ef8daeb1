"""Activation-aware: what this text has used, what all texts use, and first layers before last.

MoE-Infinity (2401.14361; `priority_score` in its code) keeps the highest

    (a / A_l) · f · (1 - l / L)

a: tokens of this sequence that chose the expert; A_l: the sum of that over its layer; f: visits
ever; l: its layer's place among L. A layer's share of the score falls with depth, because a
prefetcher can do least for the first layers. Its code also cuts the layers into an encoder and a
decoder half, which a decoder-only model has not: left out. Like there, a small amount is added to
a (EPSILON tokens), so that experts this sequence has not used are still ordered by f.

Kept as logarithms: value = ln((a + ε) · f), bias of a layer = ln(1 - l / L) - ln A_l.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from moebound.cache.catalog import Catalog
from moebound.cache.policies.base import Policy

EPSILON = 1e-3


class ActivationAware(Policy):
    name = "activation-aware"

    def begin(self, catalog: Catalog) -> None:
        super().begin(catalog)
        n_layers = len(catalog.layers)
        self._visits = [0] * len(catalog)
        self._tokens = [0] * len(catalog)
        self._sums = [0] * n_layers
        self._depth = [log(1 - place / n_layers) for place in range(n_layers)]
        self._bias = list(self._depth)
        self.value = [log(EPSILON)] * len(catalog)

    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        value, visits, total = self.value, self._visits, self._tokens
        for at, expert in enumerate(experts):
            visits[expert] = count = visits[expert] + 1
            total[expert] = chosen = total[expert] + (1 if tokens is None else tokens[at])
            value[expert] = log((chosen + EPSILON) * count)
        self._sums[place] += len(experts) if tokens is None else sum(tokens)
        self._bias[place] = self._depth[place] - log(self._sums[place])

    def begin_sequence(self) -> bool:
        self._tokens = [0] * len(self._tokens)
        self._sums = [0] * len(self._sums)
        self._bias = list(self._depth)
        # Never used counts as used once: both are the first to go in their layer.
        self.value = [log(EPSILON * max(count, 1)) for count in self._visits]
        return True

    def bias(self, place: int) -> Sequence[float]:
        return self._bias
