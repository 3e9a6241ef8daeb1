"""From what widths cost and a budget to a plan: of a grid method, or of bounds in their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebound.errors import PlanError
from moebound.plan.budget import Budget
from moebound.plan.items import Floats, Items
from moebound.plan.plan import Plan, PlannedExpert
from moebound.plan.planners import Asked, choose
from moebound.plan.widths import Family, Offers
from moebound.types import ExpertKey


@dataclass(frozen=True, eq=False)
class Deciding:
    """What a scheme of widths goes by. widths: to choose among, None for its own. seed: of the one
    that draws. shares: of routing, None for the statistics'. calibration: what those are of, for
    people."""

    offers: Offers
    widths: tuple[int, ...] | None = None
    seed: int = 0
    shares: Mapping[ExpertKey, float] | None = None
    calibration: Mapping[str, Any] | None = None

    def asked(self, budget_bytes: int) -> Asked:
        return Asked(budget_bytes, self.widths, self.seed, self.shares)

    def describe(self, scheme: str) -> dict[str, Any]:
        """For people, in a plan."""
        return {
            **({} if self.widths is None else {"widths": list(self.widths)}),
            **({"seed": self.seed} if scheme == "mptqs_re" else {}),
            **({} if self.calibration is None else {"calibration": dict(self.calibration)}),
        }

    def shape(self, scheme: str, items: Items, budget_bytes: int) -> Floats:
        """[N] 2^-width of each item, in the plan that the offers' method would have in these bytes,
        or in the fewest that it can: of rates, halving one costs a bit. Raises as `choose`."""
        narrowest = min(self.widths or self.offers.widths)
        smallest = int(self.offers.totals()[self.offers.columns([narrowest])[0]])
        found = choose(scheme, self.offers, self.asked(max(budget_bytes, smallest)))
        return np.array(
            [
                2.0 ** -float(np.mean([found[key][role] for role in roles]))
                for key, roles in zip(items.keys, items.roles, strict=True)
            ]
        )


def make_width_plan(
    deciding: Deciding, scheme: str, budget: Budget, *, source: str, made: Mapping[str, Any]
) -> Plan:
    """A width for each expert, or for each block of it, of the offers' method.

    Guarantee: the plan's bytes are those of the payloads that `store/widths.py` encoded, the
    store's to the byte, and within the budget. Raises PlanError for a budget that cannot be met,
    saying what can, for a limit of loss, of which nothing is known here, and as `choose`.
    """
    offers = deciding.offers
    source_bytes = sum(expert.n_bytes for expert in offers.experts)
    most = budget.n_bytes(n_weights=offers.n_weights, source_bytes=source_bytes)
    if most is None:
        raise PlanError(no_limit(scheme))
    check_blocks(scheme, offers.family)
    narrowest = offers.columns([min(deciding.widths or offers.widths)])[0]
    budget.refuse(
        most,
        int(offers.totals()[narrowest]),
        n_weights=offers.n_weights,
        source_bytes=source_bytes,
    )
    found = choose(scheme, offers, deciding.asked(most))
    experts = []
    for expert in offers.experts:
        widths = found[expert.key]
        first, down = next(iter(widths.values())), widths["down"]
        at = {role: offers.widths.index(width) for role, width in widths.items()}
        experts.append(
            PlannedExpert(
                expert.key,
                {},
                sum(expert.n_weights.values()),
                sum(int(expert.sizes[role][column]) for role, column in at.items()),
                method=offers.family.setting(first, down),
            )
        )
    [(usual, _)] = Counter(str(expert.method) for expert in experts).most_common(1)
    by_block = any("-" in str(expert.method) for expert in experts)
    return Plan(
        method=usual,
        scheme=scheme,
        budget=budget.asked,
        source=source,
        source_bytes=source_bytes,
        experts=tuple(experts),
        made={
            **made,
            **deciding.describe(scheme),
            "bound_per": "matrix" if by_block else "expert",
        },
    )


def check_blocks(scheme: str, family: Family) -> None:
    """Raises PlanError for a scheme of linear blocks and a method that has one width an expert."""
    if scheme == "mxmoe_re" and not family.by_block:
        raise PlanError(
            f"scheme {scheme!r} gives each linear block a width, and method {family} has one for "
            "an expert: take rtn, or a codec"
        )


def no_limit(scheme: str) -> str:
    """What is said of a scheme of widths and --max-kl."""
    return f"scheme {scheme!r} chooses widths for a size: give --bpw or --ratio, not --max-kl"
