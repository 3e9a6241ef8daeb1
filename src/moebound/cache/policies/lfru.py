"""LFRU: frequent and recent. The lowest μ · 0.25^(ν / 128) goes; μ visits ever, ν steps since.

The formula of a public MLX runtime ("LCP"; colibri has a like one under the name LFRU). All that
is compared decays alike between two uses, so the logarithm is kept, once per use:
value = ln μ + step · ln 4 / 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from moebound.cache.catalog import Catalog
from moebound.cache.policies.base import Policy

BASE, PERIOD = 0.25, 128
"""What is left of an expert's count after PERIOD steps without a use."""


class LFRU(Policy):
    name = "lfru"

    def begin(self, catalog: Catalog) -> None:
        super().begin(catalog)
        self._uses = [0] * len(catalog)

    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        now = -step * log(BASE) / PERIOD
        value, uses = self.value, self._uses
        for expert in experts:
            uses[expert] = count = uses[expert] + 1
            value[expert] = log(count) + now
