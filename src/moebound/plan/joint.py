"""From the sum of every expert's loss, each changed alone, to the loss of all changed at once.

A sum is right where losses are quadratic and errors do not correlate. What routers do when they
change their mind is neither: two small pushes on one decision are less than twice one. So a
sensitivity map measures a few models with all experts changed, and what that came to beside the sum
is used for every sum: a power law between two of them, the nearest one's ratio beyond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moebound.errors import PlanError
from moebound.files.documents import numbers
from moebound.plan.items import Items


@dataclass(frozen=True)
class Joint:
    """sums: ascending, above 0; measured: KL of all at once, ascending too. Both empty: the sum."""

    sums: tuple[float, ...] = ()
    measured: tuple[float, ...] = ()

    @classmethod
    def of(cls, joint: Mapping[str, Any], items: Items, where: str) -> Joint:
        """From a map's `joint`: `bounds`, and `measured_kl` of all experts at each of them.

        Empty if the map has none. Raises FormatError for fields that are wrong.
        """
        if joint.get("measured_kl") is None:
            return cls()
        rates = numbers(joint.get("bounds"), f"{where}: joint: bounds")
        listed = joint["measured_kl"]
        if isinstance(listed, list) and len(listed) == len(rates):
            # null: nothing was left of the model there, which says nothing of sums.
            rates = tuple(r for r, kl in zip(rates, listed, strict=True) if kl is not None)
            listed = [kl for kl in listed if kl is not None]
            if not rates:
                return cls()
        found = numbers(listed, f"{where}: joint: measured_kl", n=len(rates))
        pairs: list[tuple[float, float]] = []
        for rate, measured in sorted(zip(rates, found, strict=True)):
            loss = items.loss_at(np.full(len(items.keys), rate)) if rate > 0 else None
            total = 0.0 if loss is None else float(loss.sum())
            last = pairs[-1] if pairs else (0.0, 0.0)
            if total > last[0] and measured > last[1]:
                pairs.append((total, measured))
        return cls(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))

    def kl(self, total: float) -> float:
        """Of all at once, for this sum."""
        return _along(total, self.sums, self.measured)

    def sum_for(self, kl: float) -> float:
        """The sum at which all at once lose so much: the other way round."""
        return _along(kl, self.measured, self.sums)

    def to_json(self) -> dict[str, Any]:
        return {"sums": list(self.sums), "measured": list(self.measured)}

    @classmethod
    def from_json(cls, data: Any) -> Joint:
        """Raises PlanError, FormatError."""
        if not isinstance(data, Mapping):
            raise PlanError(f"joint: expected an object, found {str(data)[:40]!r}")
        if not data.get("sums"):
            return cls()
        sums = numbers(data["sums"], "joint: sums")
        measured = numbers(data.get("measured"), "joint: measured", n=len(sums))
        for name, values in (("sums", sums), ("measured", measured)):
            if values[0] <= 0 or any(b <= a for a, b in pairwise(values)):
                raise PlanError(f"joint: {name}: expected ascending numbers above 0")
        return cls(sums, measured)


def _along(value: float, known: tuple[float, ...], wanted: tuple[float, ...]) -> float:
    if not known or value <= 0:
        return value
    x, y = np.log(known), np.log(wanted)
    at = float(np.log(value))
    inside = float(np.clip(at, x[0], x[-1]))
    return float(np.exp(np.interp(inside, x, y) + at - inside))
