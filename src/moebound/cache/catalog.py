"""The experts that a cache may hold: their numbers, and what each weighs.

Inside the cache an expert is a number, 0 .. n-1 in the order of the model, so that policies keep
their state in plain lists. Outside it is an `ExpertKey`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from moebound.errors import CacheError
from moebound.store import Store
from moebound.types import ExpertKey

Held = Literal["decoded", "encoded"]


@dataclass(frozen=True)
class Catalog:
    """keys: in the order of the model. held_bytes: what each takes in the cache. load_bytes: what
    is moved to bring it in. Both are those of `keys`, one for one.

    Raises CacheError for no experts, experts out of order or twice, and sizes below 1 byte.
    """

    keys: tuple[ExpertKey, ...]
    held_bytes: tuple[int, ...]
    load_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise CacheError("no experts to cache")
        if not len(self.keys) == len(self.held_bytes) == len(self.load_bytes):
            raise CacheError(
                f"{len(self.keys)} experts, {len(self.held_bytes)} sizes in the cache and "
                f"{len(self.load_bytes)} to load: expected as many of each"
            )
        for before, after in zip(self.keys, self.keys[1:], strict=False):
            if not before < after:
                raise CacheError(f"{after} stands behind {before}: expected the model's order")
        for key, held, load in zip(self.keys, self.held_bytes, self.load_bytes, strict=True):
            if held < 1 or load < 1:
                raise CacheError(f"{key}: {held} bytes held and {load} loaded: expected 1 or more")

    @classmethod
    def uniform(cls, layers: Mapping[int, int], n_bytes: int) -> Catalog:
        """Every expert of n_bytes. layers: decoder index -> number of experts."""
        keys = tuple(ExpertKey(layer, e) for layer in sorted(layers) for e in range(layers[layer]))
        return cls(keys, (n_bytes,) * len(keys), (n_bytes,) * len(keys))

    @classmethod
    def of_store(cls, store: Store, *, held: Held = "decoded") -> Catalog:
        """The routed experts of a store.

        held: "decoded" if the cache has weights in the dtype they are decoded to, "encoded" if it
        has the store's bytes. What is moved are the store's bytes in both.
        """
        experts = [expert for expert in store.experts() if not expert.key.shared]
        load = [expert.n_bytes for expert in experts]
        decoded = [expert.decoded_bytes for expert in experts]
        keys = tuple(expert.key for expert in experts)
        return cls(keys, tuple(decoded if held == "decoded" else load), tuple(load))

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Decoder indices of the layers that have experts, ascending."""
        return tuple(sorted({key.layer for key in self.keys}))

    @cached_property
    def place_of(self) -> tuple[int, ...]:
        """For each expert, the place of its layer in `layers`."""
        places = {layer: place for place, layer in enumerate(self.layers)}
        return tuple(places[key.layer] for key in self.keys)

    @cached_property
    def numbers(self) -> Mapping[ExpertKey, int]:
        return {key: number for number, key in enumerate(self.keys)}

    @property
    def total_bytes(self) -> int:
        """What all of them take in the cache."""
        return sum(self.held_bytes)

    @property
    def equal_sizes(self) -> bool:
        return min(self.held_bytes) == max(self.held_bytes)

    def number(self, key: ExpertKey) -> int:
        """Raises CacheError for an expert that is not among them."""
        try:
            return self.numbers[key]
        except KeyError:
            raise CacheError(f"{key}: not among the {len(self)} experts of this cache") from None

    def smallest_budget(self, *, floor: int, working: int) -> int:
        """Bytes with which no order of visits can get stuck: `working` experts of one layer pinned
        at a time, while every other layer keeps `floor` experts; the largest ones, at worst."""
        by_layer = [list[int]() for _ in self.layers]
        for place, held in zip(self.place_of, self.held_bytes, strict=True):
            by_layer[place].append(held)
        for sizes in by_layer:
            sizes.sort(reverse=True)
        kept = [sum(sizes[:floor]) for sizes in by_layer]
        at_work = [sum(sizes[: max(working, floor)]) for sizes in by_layer]
        return sum(kept) + max(work - keep for work, keep in zip(at_work, kept, strict=True))

    def check_budget(self, budget_bytes: int, *, floor: int, working: int) -> None:
        """Raises CacheError, naming the smallest budget, if budget_bytes is below it."""
        if floor < 0 or working < 1:
            raise CacheError(f"floor {floor}, working set {working}: expected 0 and 1 at least")
        least = self.smallest_budget(floor=floor, working=working)
        if budget_bytes < least:
            raise CacheError(
                f"budget {budget_bytes} bytes: too small for {working} experts of a layer at work "
                f"and {floor} kept in each of the other {len(self.layers) - 1} layers; the "
                f"smallest budget is {least} bytes ({100 * least / self.total_bytes:.1f} % of all "
                "experts)"
            )
