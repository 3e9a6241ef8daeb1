"""LFU: the one used least often goes. value = number of visits that used it, ever.

What MoE-Infinity's live path does (2401.14361), except that its count starts again when an expert
is loaded. Here it goes on: experts are few, and a count that is forgotten on eviction keeps a
popular expert that was evicted once from staying.
"""

from __future__ import annotations

from collections.abc import Sequence

from moebound.cache.policies.base import Policy


class LFU(Policy):
    name = "lfu"

    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        value = self.value
        for expert in experts:
            value[expert] += 1.0
