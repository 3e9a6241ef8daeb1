"""LRU: the one not used for the longest time goes. value = number of the visit that last used it.

Mixtral-offloading (Eliseev & Mazur, 2312.17238) keeps such a list for each layer, FreeToken one
for all; here it is one for all, above the cache's floor.
"""

from __future__ import annotations

from collections.abc import Sequence

from moebound.cache.catalog import Catalog
from moebound.cache.policies.base import Policy


class LRU(Policy):
    name = "lru"

    def begin(self, catalog: Catalog) -> None:
        super().begin(catalog)
        self._visit = 0

    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        self._visit = now = self._visit + 1
        value = self.value
        for expert in experts:
            value[expert] = now
