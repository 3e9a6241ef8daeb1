"""What a replacement policy is: a value for each expert, and the lowest goes first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from moebound.cache.catalog import Catalog


class Policy(ABC):
    """Ranks experts. The cache evicts the resident with the lowest `value + bias of its layer`,
    of equal ones the first in the order of the model, and passes over those it may not evict.

    A policy sees every visit, of residents or not, before the cache makes room; it keeps what it
    knows of experts that have left. One object serves one cache, under that cache's lock.

    A value may rise at any time. It may fall only in `begin_sequence` and `evicted`: in between,
    the cache looks again only at those that come up for eviction, and would not notice.
    """

    name: ClassVar[str]

    catalog: Catalog
    value: list[float]
    """By expert number."""

    def begin(self, catalog: Catalog) -> None:
        """Forget everything, and expect the experts of this catalog."""
        self.catalog = catalog
        self.value = [0.0] * len(catalog)

    @abstractmethod
    def use(
        self,
        step: int,
        place: int,
        experts: Sequence[int],
        tokens: Sequence[int] | None,
        leading: int,
    ) -> None:
        """A forward pass computes these experts of one layer. Sets their values.

        step: the forward pass, from 0, ascending. place: the layer's place in catalog.layers.
        experts: numbers, each once. tokens: how many tokens chose each; None for one each.
        leading: so many of them, the first ones, matter most (HOBBIT's high-precision uses).
        """

    def begin_sequence(self) -> bool:
        """A new text begins. True: values have fallen, and the cache ranks all residents anew."""
        return False

    def bias(self, place: int) -> Sequence[float] | None:
        """For each layer, what is added to its experts' values while layer `place` needs room;
        None for nothing."""
        return None

    def admitted(self, expert: int) -> None:  # noqa: B027  # most have nothing to do
        """It is resident from now on. May set its value."""

    def evicted(self, expert: int) -> None:  # noqa: B027
        """It was the one with the lowest value, and is gone. May set its value."""
