"""From sizes, measurements and a budget to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from moebound.errors import PlanError
from moebound.files.documents import Document, fields_of
from moebound.files.formats.sensitivity_map import SensitivityMap
from moebound.files.formats.statistics import Statistics
from moebound.files.formats.study import Row
from moebound.plan import fisher, schemes
from moebound.plan.budget import Budget
from moebound.plan.fit import Fit
from moebound.plan.items import ExpertSizes, Floats, Items
from moebound.plan.joint import Joint
from moebound.plan.losses import from_errors, from_sensitivity, from_study, shares_from_profile
from moebound.plan.make_widths import Deciding, no_limit
from moebound.plan.plan import CODEC_METHOD, Plan, planned_experts
from moebound.plan.planners import WIDTH_SCHEMES
from moebound.plan.schemes import Scheme
from moebound.plan.search import SQUARE, Found, Say, Tries
from moebound.plan.search import search as search_for
from moebound.plan.shape import Shape
from moebound.plan.shape import within_bytes as shaped_within_bytes
from moebound.plan.within import Measure, within_measured
from moebound.types import ExpertKey


@dataclass(frozen=True)
class Evidence:
    """What was measured, all of it optional. study: rows. sensitivity, profile: documents.
    calibration: the statistics that experts were rounded by."""

    sensitivity: Document | None = None
    study: Sequence[Row] | None = None
    profile: Document | None = None
    calibration: Statistics | None = None

    @property
    def scheme(self) -> Scheme:
        """The one that makes most of it."""
        if self.sensitivity is not None or self.study is not None:
            return "sensitivity"
        if self.calibration is not None and self.calibration.of.fisher:
            return "fisher"
        return "frequency" if self.profile is not None else "uniform"

    @property
    def has_roles(self) -> bool:
        """Whether losses are known by projection."""
        found = self.map
        return found is not None and bool(found.experts) and all(e.by_role for e in found.experts)

    @cached_property
    def map(self) -> SensitivityMap | None:
        """What `sensitivity` says. Raises FormatError for fields that are wrong."""
        return None if self.sensitivity is None else SensitivityMap.of(self.sensitivity)


@dataclass(frozen=True)
class Search:
    """How to search. tries: what measures plans. n_most: measurements. say: is told of each."""

    tries: Tries
    n_most: int
    say: Say = lambda *_: None


def make_plan(
    experts: Sequence[ExpertSizes],
    evidence: Evidence,
    budget: Budget,
    *,
    source: str,
    codec: str = "bound",
    method: str | None = None,
    scheme: Scheme | None = None,
    per_role: bool | None = None,
    measure: Measure | None = None,
    encoded: Callable[[Plan], Mapping[ExpertKey, int]] | None = None,
    search: Search | None = None,
    deciding: Deciding | None = None,
    widest: fisher.Widest | None = None,
) -> Plan:
    """A bound for each expert, or each of its matrices.

    experts: what they take at every rate, with that codec or method, see `store.measure_sizes` and
    `measure_calibrated`. method: a setting, instead of a codec. scheme: None for the one that makes
    most of the evidence. per_role: a bound for each matrix; None for yes where losses are known so.
    measure: says what a plan loses, see `sensitivity/trial.py`; None to go by predictions.
    encoded: says what a plan's experts really take; None to believe `experts`. search: how, for the
    scheme of that name, and for `max_kl` where no losses are known. deciding: what widths cost, for
    the schemes of `planners.py`: an expert's rate is λ · 2^-width. widest: of
    `store.fisher_bounds`, for scheme fisher.

    Guarantee: predicted bytes are within the budget, and with `encoded` they are the store's to the
    byte; measured KL is, where there is a `measure`, and the plan has it. Raises PlanError if the
    budget cannot be met, saying what can, and for evidence that is missing or another model's;
    FormatError for damaged evidence; and what `measure`, `encoded` and `search` raise.
    """
    setting = CODEC_METHOD + codec if method is None else method
    chosen = scheme or ("search" if search is not None else evidence.scheme)
    bounded = setting.startswith(CODEC_METHOD)
    by_errors = not bounded and evidence.map is not None and all(e.plain for e in experts)
    if not bounded and not by_errors and chosen in ("sensitivity", "layer"):
        raise PlanError(
            f"scheme {chosen!r} goes by losses, and there are none of method {setting!r}: give "
            "--sensitivity, or take scheme 'search', which measures them"
        )
    if chosen == "fisher":
        if widest is None:
            raise PlanError(
                "scheme 'fisher' goes by what the loss feels of each matrix: give --calibration a "
                "folder of `moebound calibrate --fisher`"
            )
        if budget.max_kl is not None:
            raise PlanError(
                "--max-kl: scheme 'fisher' knows sizes and no losses; give --bpw or --ratio"
            )
        per_role = per_role is None or per_role
    if chosen in WIDTH_SCHEMES:
        if budget.max_kl is not None:
            raise PlanError(no_limit(chosen))
        if deciding is None:
            raise PlanError(
                f"scheme {chosen!r} needs to know what widths cost, and nobody measured"
            )
        if chosen == "mxmoe_re" and per_role is False:
            raise PlanError(f"scheme {chosen!r} gives each linear block a bound: not one an expert")
        per_role = per_role or chosen == "mxmoe_re"
        evidence = replace(evidence, sensitivity=None, study=None)
    by_losses = chosen in ("sensitivity", "search") and (bounded or by_errors)
    roles = evidence.has_roles and by_losses if per_role is None else per_role
    share = None
    if evidence.profile is not None:
        share = shares_from_profile(evidence.profile, [expert.key for expert in experts])
    made: dict[str, Any] = {}
    joint = Joint()
    if by_errors and evidence.sensitivity is not None and evidence.map is not None:
        with fields_of(str(evidence.sensitivity.path), PlanError):
            items, facts = from_errors(evidence.map, experts, per_role=roles)
        made = {"sensitivity": evidence.sensitivity.describe(), **facts}
    elif not bounded:
        items = Items.of(experts, per_role=roles)
    elif evidence.sensitivity is not None and evidence.map is not None:
        where = str(evidence.sensitivity.path)
        with fields_of(where, PlanError):
            items, facts = from_sensitivity(evidence.map, experts, per_role=roles)
        made = {"sensitivity": evidence.sensitivity.describe(), **facts}
        joint = Joint.of(evidence.map.joint, items, where)
    elif evidence.study is not None:
        if roles:
            raise PlanError("a study knows no losses by projection; plan a bound per expert")
        items, made = from_study(evidence.study, experts, share=share)
    else:
        items = Items.of(experts, per_role=roles)
    if evidence.profile is not None:
        made["profile"] = evidence.profile.describe()
    if evidence.calibration is not None:
        made["calibration"] = evidence.calibration.of.to_json()

    source_bytes = sum(expert.n_bytes for expert in experts)
    n_weights = int(items.n_weights.sum())

    def plan_of(rates: Floats) -> Plan:
        return Plan(
            method=setting,
            scheme=chosen,
            budget=budget.asked,
            source=source,
            source_bytes=source_bytes,
            experts=planned_experts(items, rates),
            joint=joint,
            made={**made, "bound_per": "matrix" if roles else "expert"},
        )

    def total(plan: Plan) -> int:
        assert encoded is not None
        return sum(encoded(plan).values())

    def fit(most: int) -> Fit:
        return Fit(most, None if encoded is None else total)

    def solve(asked: Budget) -> Plan:
        most = asked.n_bytes(n_weights=n_weights, source_bytes=source_bytes)
        loss = None if asked.max_kl is None else joint.sum_for(asked.max_kl)
        _check(asked, items, most, joint, source_bytes)
        if most is None:
            return plan_of(_rates(chosen, items, experts, share, None, loss))
        if deciding is not None and chosen in WIDTH_SCHEMES:
            shape = deciding.shape(chosen, items, most)
            made.update(deciding.describe(chosen) | {"widths_of": str(deciding.offers.family)})
            return fit(most)(
                lambda n: plan_of(schemes.scaled(items, shape, budget_bytes=n, max_kl=None))
            )
        if widest is not None and chosen == "fisher":
            octaves = fisher.shape(items, experts, widest)
            return fit(most)(
                lambda n: plan_of(schemes.scaled(items, octaves, budget_bytes=n, max_kl=None))
            )
        return fit(most)(lambda n: plan_of(_rates(chosen, items, experts, share, n, None)))

    def really(plan: Plan) -> Plan:
        """With the bytes that it takes."""
        return plan if encoded is None else plan.with_bytes(encoded(plan))

    if chosen == "search" or (budget.max_kl is not None and items.loss is None):
        if search is None:
            what = "scheme 'search'" if chosen == "search" else "a limit of loss (--max-kl)"
            raise PlanError(
                f"{what} needs measured losses: give --sensitivity or --study, or say with --task "
                "on what to measure plans"
            )
        most = budget.n_bytes(n_weights=n_weights, source_bytes=source_bytes)
        _check(budget, items, most, joint, source_bytes)
        known = _told_apart(items, experts, most)
        shaped = _Shaped(known, fit, plan_of, search, n_weights, chosen == "search")
        if most is not None:
            plan = shaped.of_bytes(most)
        else:
            assert budget.max_kl is not None
            plan = shaped.of_loss(budget.max_kl, measure or search.tries.measure)
        plan = really(plan)
        if plan.measured is None and measure is not None:
            plan = replace(plan, measured=measure(plan))
        return plan
    if measure is None:
        return really(solve(budget))
    if budget.max_kl is None:
        plan = really(solve(budget))
        return replace(plan, measured=measure(plan))
    return really(within_measured(lambda kl: solve(Budget(max_kl=kl)), measure, budget.max_kl))


@dataclass(frozen=True, eq=False)
class _Shaped:
    """Plans of shapes. searched: whether a shape is looked for, or all have one rate."""

    items: Items
    fit: Callable[[int], Fit]
    plan_of: Callable[[Floats], Plan]
    search: Search
    n_weights: int
    searched: bool

    def of_bytes(self, most: int) -> Plan:
        found = self._found(most)
        return replace(found.plan, made={**found.plan.made, "search": found.to_json()})

    def of_loss(self, max_kl: float, measure: Measure) -> Plan:
        """The smallest whose KL is at most this: searched for at the size at which one rate for all
        has that KL, on the problems of the search, and then made smaller."""
        near = within_measured(self._like(Shape(), max_kl, 4.0), self.search.tries.measure, max_kl)
        if not self.searched:
            shape, made, bits = Shape(), {}, near.bits_per_weight
        else:
            found = self._found(near.n_bytes)
            shape, made = found.shape, {"search": found.to_json()}
            bits = near.bits_per_weight - math.log2(max_kl / max(found.measured.kl, max_kl / 16))
        plan = within_measured(self._like(shape, max_kl, bits), measure, max_kl)
        return replace(plan, made={**plan.made, **made})

    def _found(self, most: int) -> Found:
        return search_for(
            self.items, self.fit(most), self.plan_of, self.search.tries, self.search.n_most,
            say=self.search.say,
        )  # fmt: skip

    def _like(self, shape: Shape, kl: float, bits: float) -> Callable[[float], Plan]:
        """Plans of a shape by the KL that is asked of them, if one of so many bits has this one and
        a bit less is twice as much."""
        fit = self.fit(0)

        def make(asked: float) -> Plan:
            wanted = bits - math.log2(asked / kl)
            fit.budget_bytes = int(wanted * self.n_weights / 8)
            return fit(lambda n: self.plan_of(shaped_within_bytes(self.items, shape, n)))

        return make


def _told_apart(items: Items, experts: Sequence[ExpertSizes], most: int | None) -> Items:
    """With what a search may begin with: the plan that predicted losses ask for, or the errors that
    statistics know of."""
    if items.loss is not None and most is not None:
        octaves = np.log2(schemes.sensitivity(items, budget_bytes=most, max_kl=None))
        layers = np.unique([key.layer for key in items.keys], return_inverse=True)[1]
        mean = np.bincount(layers, octaves) / np.bincount(layers)
        return replace(items, hull=octaves - octaves.mean(), within=octaves - mean[layers])
    if all(expert.errors for expert in experts):
        lost = {
            e.key: float(sum(e.errors[role][len(e.rates) // 2] for role in e.roles))
            for e in experts
        }
        return items.with_within(lost, SQUARE)
    return items


def _rates(
    scheme: Scheme,
    items: Items,
    experts: Sequence[ExpertSizes],
    share: Mapping[Any, float] | None,
    budget_bytes: int | None,
    max_kl: float | None,
) -> Floats:
    if scheme == "uniform":
        return schemes.uniform(items, budget_bytes=budget_bytes, max_kl=max_kl)
    if scheme == "layer":
        return schemes.by_layer(items, budget_bytes=budget_bytes, max_kl=max_kl)
    if scheme == "sensitivity":
        return schemes.sensitivity(items, budget_bytes=budget_bytes, max_kl=max_kl)
    if share is None:
        raise PlanError(f"scheme {scheme!r} needs routing counts: give --profile")
    if scheme == "frequency":
        return schemes.by_frequency(items, share, budget_bytes=budget_bytes, max_kl=max_kl)
    ranks = schemes.ranks_of(experts)
    return schemes.rfid(items, share, ranks, budget_bytes=budget_bytes, max_kl=max_kl)


def _check(budget: Budget, items: Items, most: int | None, joint: Joint, source_bytes: int) -> None:
    """Raises PlanError for a budget that no scheme can meet, and says in its units what can be."""
    if most is None:
        if items.loss is not None and budget.max_kl is not None:
            least = joint.kl(float(items.loss[:, 0].sum()))
            if least > budget.max_kl:
                raise PlanError(
                    f"--max-kl {budget.max_kl:g} cannot be met: the narrowest bounds of the grid "
                    f"are predicted to lose {least:.3g}"
                )
        return
    # At the widest rate; a narrower one may happen to be a few bytes less, which few schemes find.
    smallest = int(items.sizes[:, -1].sum())
    budget.refuse(most, smallest, n_weights=int(items.n_weights.sum()), source_bytes=source_bytes)
