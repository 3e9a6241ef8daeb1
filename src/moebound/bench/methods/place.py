"""The model whose experts are brought to a size, and what brings them to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from moebound.bench.methods.making import Candidate
from moebound.checkpoint import Checkpoint
from moebound.checkpoint.families import router_groups_of, top_k_of
from moebound.errors import SizeError
from moebound.files.formats.statistics import Statistics
from moebound.methods import get_method
from moebound.store.at_size import groups_of, measured, rate_at, sample
from moebound.store.recipe import Recipe
from moebound.types import ErrorBound

WITHIN = 0.01
"""How near to the size that was asked a row has to be."""
ABOUT = 0.1
"""How near a guess has to be, for the thing itself to be made."""

Search = Callable[[float], Candidate]
"""From the bits a weight that are asked to what is thought to come to them. Asked again, a little
more or less, it changes nothing but the number that is searched."""


@dataclass(frozen=True, eq=False)
class Place:
    """The model whose experts are made small, and its statistics. fisher: those of `calibrate
    --fisher`, for what is planned by them."""

    checkpoint: Checkpoint
    calibration: Statistics | None = None
    fisher: Statistics | None = None
    _measured: dict[str, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def n_experts(self) -> int:
        """Of a layer; of the smallest."""
        layers: dict[int, int] = {}
        for expert in self.checkpoint.experts():
            layers[expert.key.layer] = layers.get(expert.key.layer, 0) + 1
        return min(layers.values())

    @cached_property
    def raw_bits(self) -> float:
        experts = self.checkpoint.experts()
        return 8 * sum(e.n_bytes for e in experts) / sum(e.size for e in experts)

    @cached_property
    def layers(self) -> list[int]:
        return sorted({expert.key.layer for expert in self.checkpoint.experts()})

    def counts(self) -> list[int]:
        """How many of a layer's experts can be kept, fewer than all."""
        groups, chosen = router_groups_of(self.checkpoint.config)
        least = -(-top_k_of(self.checkpoint.config) // chosen)
        least = max(2, least) if groups > 1 else least
        return list(range(least * groups, self.n_experts, groups))

    def rate(self, setting: str, bits: float) -> float:
        """At which a method comes to so many bits on a sample. Raises SizeError if at none."""
        rate = rate_at(self.checkpoint, setting, self.calibration, bits, whole=False)
        size, _ = self.measured(setting, rate)
        if abs(size - bits) > ABOUT * bits:
            raise SizeError(
                f"{bits:g} bits a weight: no rate comes to that; the nearest is {size:.4g} bits",
                size,
            )
        return rate

    def measured(self, setting: str, rate: float | None = None) -> tuple[float, float]:
        """Bits a weight, and the mean square error, of a sample."""
        key = f"{setting} {rate}"
        if key not in self._measured:
            method = get_method(setting)
            bound = None if rate is None else ErrorBound(rate, "rate", "expert")
            recipe = Recipe.of(bound, setting, self.calibration)
            some = sample(groups_of(self.checkpoint, method), method)
            self._measured[key] = measured(self.checkpoint, method, recipe, some)
        return self._measured[key]


class Sizing(ABC):
    """How one method, as it was asked for, comes to a size."""

    @abstractmethod
    def search(self, bits: float) -> Search:
        """Raises SizeError where it is known beforehand that it cannot."""
