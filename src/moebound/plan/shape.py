"""Rates of a shape: how much wider one expert's bound is than another's, at one size of all.

A shape says so in octaves, by layer, by role, and by what an expert's errors are within its layer.
Moved up or down as a whole it has every size. Rates are of the grid, since what was encoded once
need not be encoded again for the next plan: an item between two rates of it gets either, and of a
layer's items so many the wider one that the layer's mean is as asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from moebound.errors import PlanError
from moebound.plan.items import Floats, Ints, Items

_GOLDEN = (np.sqrt(5) - 1) / 2
_HALVINGS = 60


@dataclass(frozen=True)
class Shape:
    """Octaves by which rates are wider. layers, roles: 0 for those not named. experts: how much of
    the difference between a layer's experts is made good (`Items.within`): 0 none of it, 1 all.
    losses: how far to go from one rate to what predicted losses ask for (`Items.hull`)."""

    layers: Mapping[int, float] = field(default_factory=dict)
    roles: Mapping[str, float] = field(default_factory=dict)
    experts: float = 0.0
    losses: float = 0.0

    def moved(self, kind: str, name: int | str, by: float) -> Shape:
        """With one of its numbers changed."""
        if kind == "experts":
            return replace(self, experts=self.experts + by)
        if kind == "losses":
            return replace(self, losses=self.losses + by)
        if kind == "layers":
            layer = int(name)
            return replace(self, layers={**self.layers, layer: self.layers.get(layer, 0.0) + by})
        role = str(name)
        return replace(self, roles={**self.roles, role: self.roles.get(role, 0.0) + by})

    def scaled(self, by: float) -> Shape:
        """All its numbers times this."""
        return Shape(
            {layer: by * octaves for layer, octaves in self.layers.items()},
            {role: by * octaves for role, octaves in self.roles.items()},
            by * self.experts,
            by * self.losses,
        )

    def to_json(self) -> dict[str, object]:
        """For people."""
        return {
            "layers": {str(layer): by for layer, by in sorted(self.layers.items())},
            "roles": dict(self.roles),
            "experts": self.experts,
            "losses": self.losses,
        }

    def offsets(self, items: Items) -> Floats:
        """[N] octaves. Raises PlanError for experts that differ where nothing tells them apart."""
        found = np.array(
            [
                self.layers.get(key.layer, 0.0)
                + float(np.mean([self.roles.get(role, 0.0) for role in roles]))
                for key, roles in zip(items.keys, items.roles, strict=True)
            ]
        )
        if self.experts:
            if items.within is None:
                raise PlanError("what experts lose is not known: give --sensitivity")
            found += self.experts * items.within
        if self.losses:
            if items.hull is None:
                raise PlanError("what experts lose is not known: give --sensitivity")
            found += self.losses * items.hull
        return found


def within_bytes(items: Items, shape: Shape, budget_bytes: int) -> Floats:
    """[N] rates of the grid: the shape, as narrow as so many bytes allow.

    Raises PlanError, with the smallest size there is, if even that is over.
    """
    at = shape.offsets(items)
    last, rows = len(items.rates) - 1, np.arange(len(at))
    by_octave = last / np.log2(items.rates[-1] / items.rates[0])
    between = _thresholds(items)

    def columns(wider: float) -> Ints:
        found = np.floor((at + wider) * by_octave + between).astype(np.int64)
        return np.asarray(np.clip(found, 0, last))

    low = -float(at.max()) - 1.0
    high = last / by_octave - float(at.min()) + 1.0
    smallest = int(items.sizes[rows, columns(high)].sum())
    if smallest > budget_bytes:
        raise PlanError(
            f"a budget of {budget_bytes} bytes cannot be met: the smallest is {smallest} bytes"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if items.sizes[rows, columns(middle)].sum() <= budget_bytes:
            high = middle
        else:
            low = middle
    return items.rates[columns(high)]


def _thresholds(items: Items) -> Floats:
    """[N] in [0, 1), spread evenly over the experts of each layer: which of them get the wider of
    two rates. The same for all matrices of an expert."""
    seen: dict[int, dict[int, int]] = {}
    found = []
    for key in items.keys:
        place = seen.setdefault(key.layer, {})
        found.append((place.setdefault(key.expert, len(place)) + 0.5) * _GOLDEN % 1)
    return np.array(found)
