"""Searching for plans on a loss that is measured: within the bytes, never worse, the same again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moebound.errors import PlanError
from moebound.plan import Budget, Evidence, Measured, Plan, Search, make_plan
from moebound.plan.fit import Fit
from moebound.plan.items import ExpertSizes, Items
from moebound.plan.search import joining
from moebound.plan.shape import Shape, within_bytes
from moebound.score import Score, Tokens
from moebound.types import ExpertKey

from .conftest import as_document, experts, sensitivity

SIZES = experts(4, 8)
AT_3, NOTHING = Budget(bpw=3), Evidence()
N_WEIGHTS = 4 * 8 * 3 * 2048
FACTORS = np.random.default_rng(5).gamma(0.5, size=32)  # a few problems make most of a loss


class Model:
    """Tries of a model that loses so much by layer, a rate's worth, and more where layers are
    disturbed together. luck: of each plan, a share of its loss."""

    def __init__(self, by_layer: Mapping[int, float], luck: float = 0.0) -> None:
        self.by_layer, self.luck = by_layer, luck
        self.tried: list[tuple[str, int | None]] = []

    def measure(self, plan: Plan, layer: int | None = None, expert: int | None = None) -> Measured:
        self.tried.append((plan.sha256, layer))
        lost = {
            key: math.hypot(
                *(
                    e.bounds["down"].value
                    for e in plan.experts
                    if e.key.layer == key and expert in (None, e.key.expert)
                )
            )
            for key in self.by_layer
            if layer in (None, key)
        }
        total = sum((self.by_layer[key] * value) ** 1.5 for key, value in lost.items()) ** (1 / 1.5)
        each = 1e-3 * total * FACTORS
        swing = np.random.default_rng(int(plan.sha256[:8], 16)).standard_normal(len(each))
        each = each * np.exp(self.luck * swing)
        score = Score(
            kl_nats=float(each.mean()), kl_stderr=0.0,
            answer_kl_nats=0.0, answer_kl_stderr=0.0, n_problems=len(each),
            kl_sums=tuple((float(kl), 0.0) for kl in each),
        )  # fmt: skip
        return Measured(score, "t", tokens="all")


STEEP = {1: 1.0, 2: 0.2, 3: 0.05, 4: 0.3}


def searched(
    model: Model,
    budget: Budget = AT_3,
    n: int = 80,
    evidence: Evidence = NOTHING,
    encoded: Callable[[Plan], Mapping[ExpertKey, int]] | None = None,
    sizes: list[ExpertSizes] = SIZES,
) -> Plan:
    return make_plan(
        sizes, evidence, budget, source="tiny", encoded=encoded, search=Search(model, n)
    )


def test_a_search_beats_one_rate_in_the_same_bytes() -> None:
    model = Model(STEEP)
    plan = searched(model)
    assert plan.scheme == "search"
    assert 0.99 * 3 < plan.bits_per_weight <= 3
    one = make_plan(SIZES, Evidence(), Budget(bpw=3), source="tiny")
    assert model.measure(plan).kl < 0.7 * model.measure(one).kl
    rates = {layer: np.mean([e.bounds["up"].value for e in plan.experts if e.key.layer == layer])
             for layer in STEEP}  # fmt: skip
    assert rates[1] < rates[4] < rates[3]
    says = plan.made["search"]
    assert says["kl"] == pytest.approx(model.measure(plan).kl)
    assert says["kl"] < says["kl_of_one_rate"]
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("n", [1, 2, 5, 17, 40])
@pytest.mark.parametrize("luck", [0.0, 0.3, 1.0])
def test_a_search_never_ends_worse_than_it_began(n: int, luck: float) -> None:
    for by_layer in (STEEP, dict.fromkeys(STEEP, 1.0)):
        model = Model(by_layer, luck)
        plan = searched(model, n=n)
        assert len(model.tried) <= n
        first = next(sha for sha, layer in model.tried if layer is None)
        says = plan.made["search"]
        assert says["n_measured"] == len(model.tried)
        assert says["kl"] <= says["kl_of_one_rate"]
        assert model.measure(plan).kl == says["kl"]
        assert n > 1 or plan.sha256 == first


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_no_more_measurements_than_are_asked_for(n: int, tmp_path: Path) -> None:
    evidence = Evidence(sensitivity=as_document(sensitivity(SIZES), tmp_path))
    model = Model(STEEP)
    assert searched(model, n=n, evidence=evidence).made["search"]["n_measured"] <= n
    assert len(model.tried) <= n


def test_the_same_again() -> None:
    one, other = Model(STEEP, 0.2), Model(STEEP, 0.2)
    assert searched(one) == searched(other)
    assert one.tried == other.tried


def test_the_budget_is_of_real_bytes() -> None:
    """Sizes are off by a twentieth, and differently for every expert."""
    off = {e.key: 1.02 + 0.06 * np.random.default_rng(i).random() for i, e in enumerate(SIZES)}

    def encoded(plan: Plan) -> dict[ExpertKey, int]:
        return {e.key: math.ceil(off[e.key] * e.n_bytes) for e in plan.experts}

    for bpw in (2.2, 3.1, 4.5):
        plan = searched(Model(STEEP), Budget(bpw=bpw), 30, encoded=encoded)
        assert 0.985 * bpw < plan.bits_per_weight <= bpw
    uniform = make_plan(
        SIZES, Evidence(), Budget(bpw=3), source="tiny", scheme="uniform", encoded=encoded
    )
    assert 0.985 * 3 < uniform.bits_per_weight <= 3
    # With the bytes that it takes, not those that were thought.
    plain = make_plan(SIZES, Evidence(), Budget(bpw=3), source="tiny", scheme="uniform")
    assert uniform.widest is not None
    assert plain.widest is not None
    assert uniform.widest.value > plain.widest.value


def test_a_fit_that_nothing_meets() -> None:
    plan = make_plan(SIZES, Evidence(), Budget(bpw=3), source="tiny")
    with pytest.raises(PlanError, match="cannot be met: plans of about this size"):
        Fit(100, lambda _: 101)(lambda _: plan)


def test_a_limit_of_measured_loss() -> None:
    model = Model(STEEP)
    at_3 = model.measure(searched(model)).kl
    plan = searched(Model(STEEP), Budget(max_kl=at_3))
    assert plan.measured is not None
    assert plan.measured.kl <= at_3
    assert plan.bits_per_weight == pytest.approx(3, rel=0.08)
    uniform = make_plan(
        SIZES, Evidence(), Budget(max_kl=at_3), source="tiny", scheme="uniform",
        search=Search(Model(STEEP), 10),
    )  # fmt: skip
    assert uniform.measured is not None
    assert uniform.measured.kl <= at_3
    assert uniform.n_bytes > 1.1 * plan.n_bytes


def test_experts_of_a_layer_by_what_a_map_says(tmp_path: Path) -> None:
    content = sensitivity(SIZES)
    for at, entry in enumerate(content["experts"]):
        entry["predicted_kl"] = [(4.0 if at % 8 == 0 else 1.0) * rate for rate in (1, 3, 5, 8)]
    evidence = Evidence(sensitivity=as_document(content, tmp_path))
    items = Items.of(SIZES, per_role=False)
    within = items.with_within({e.key: 4.0 if e.key.expert == 0 else 1.0 for e in SIZES}, 1.0)
    rates = within_bytes(within, Shape(experts=1.0), 3 * N_WEIGHTS // 8)
    by_expert = [float(np.mean(np.log2(rates[at::8]))) for at in range(8)]
    assert np.mean(by_expert[1:]) - by_expert[0] == pytest.approx(2, abs=0.35)
    with pytest.raises(PlanError, match="what experts lose is not known"):
        within_bytes(items, Shape(experts=1.0), 3 * N_WEIGHTS // 8)

    class Experts(Model):
        def measure(
            self, plan: Plan, layer: int | None = None, expert: int | None = None
        ) -> Measured:
            found = super().measure(plan, layer, expert)
            most = sum(e.bounds["up"].value for e in plan.experts if e.key.expert == 0)
            sums = tuple((kl * (0.1 + most), 0.0) for kl, _ in found.score.kl_sums)
            kl = float(np.mean([kl for kl, _ in sums]))
            return replace(found, score=replace(found.score, kl_nats=kl, kl_sums=sums))

    plan = searched(Experts(dict.fromkeys(STEEP, 1.0)), evidence=evidence)
    shape = plan.made["search"]["shape"]
    assert shape["losses"] > 0 or shape["experts"] > 0
    first, others = (
        np.mean([e.bounds["up"].value for e in plan.experts if (e.key.expert == 0) == is_first])
        for is_first in (True, False)
    )
    assert first < 0.8 * others


def test_experts_are_measured_alone_where_there_are_measurements_for_it() -> None:
    class Uneven(Model):
        def measure(
            self, plan: Plan, layer: int | None = None, expert: int | None = None
        ) -> Measured:
            found = super().measure(plan, layer, expert)
            hurts = [e for e in plan.experts if e.key.expert == 3 and expert in (None, 3)]
            of = [e.bounds["up"].value for e in hurts if layer in (None, e.key.layer)]
            more = 1e-2 * sum(of)
            sums = tuple((kl + more, 0.0) for kl, _ in found.score.kl_sums)
            kl = float(np.mean([kl for kl, _ in sums]))
            return replace(found, score=replace(found.score, kl_nats=kl, kl_sums=sums))

    model = Uneven(dict.fromkeys(STEEP, 0.1))
    plan = searched(model, n=140)
    assert plan.made["search"]["shape"]["experts"] > 0
    third, others = (
        np.mean([e.bounds["up"].value for e in plan.experts if (e.key.expert == 3) == is_third])
        for is_third in (True, False)
    )
    assert third < 0.7 * others
    few = searched(Uneven(dict.fromkeys(STEEP, 0.1)), n=40)
    assert few.made["search"]["shape"]["experts"] == 0


@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_a_plan_protects_the_tokens_that_count(tokens: Tokens) -> None:
    """Prompts feel the first layer, and answers the last."""

    class Both(Model):
        def measure(
            self, plan: Plan, layer: int | None = None, expert: int | None = None
        ) -> Measured:
            prompts = Model({1: 1.0, 2: 0.1, 3: 0.1, 4: 0.0}).measure(plan, layer, expert)
            answers = Model({1: 0.0, 2: 0.1, 3: 0.1, 4: 0.5}).measure(plan, layer, expert)
            sums = tuple(
                (one + other, other)
                for (one, _), (other, _) in zip(
                    prompts.score.kl_sums, answers.score.kl_sums, strict=True
                )
            )
            score = replace(
                prompts.score,
                kl_nats=prompts.kl + answers.kl,
                answer_kl_nats=answers.kl,
                kl_sums=sums,
            )
            return Measured(score, "t", tokens=tokens)

    plan = searched(Both(STEEP))
    first, last = (
        np.mean([e.bounds["up"].value for e in plan.experts if e.key.layer == layer])
        for layer in (1, 4)
    )
    assert (first < 0.8 * last) if tokens == "all" else (last < 0.5 * first)


def test_how_losses_join() -> None:
    assert joining(np.array([1.0, 1.0]), 2.0) == pytest.approx(1, abs=1e-6)
    assert joining(np.array([1.0, 1.0]), math.sqrt(2)) == pytest.approx(2, abs=1e-6)
    assert joining(np.array([1.0, 1.0]), 0.5) == pytest.approx(4, abs=1e-6)
    assert joining(np.array([0.0, 0.0]), 0.5) == 1


def test_what_cannot_be_searched() -> None:
    with pytest.raises(PlanError, match=r"scheme 'search' needs measured losses.*--task"):
        make_plan(SIZES, Evidence(), Budget(bpw=3), source="x", scheme="search")
    with pytest.raises(PlanError, match=r"--bpw 0\.1 cannot be met"):
        searched(Model(STEEP), Budget(bpw=0.1))
    with pytest.raises(PlanError, match="leaves nothing of the model"):
        searched(Model(dict.fromkeys(STEEP, math.inf)))
    with pytest.raises(PlanError, match=r"'layer' .* none of method 'calibrated'"):
        make_plan(SIZES, Evidence(), Budget(bpw=3), source="x", method="calibrated", scheme="layer")
