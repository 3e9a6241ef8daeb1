"""Plans: every scheme in the same budget, better ones better, files that come back as they went."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moebound.errors import BoundError, FormatError, PlanError, StoreError
from moebound.plan import Budget, Evidence, Plan, Scheme, effective_rank, make_plan
from moebound.types import ErrorBound, ExpertKey

from .conftest import BOUNDS, as_document, experts, profile, sensitivity

SIZES = experts(4, 16)
N_WEIGHTS = 4 * 16 * 3 * 2048
SCHEMES: tuple[Scheme, ...] = ("uniform", "layer", "frequency", "rfid", "sensitivity")


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    return Evidence(
        sensitivity=as_document(sensitivity(SIZES, by_role=True), tmp_path),
        profile=as_document(profile(SIZES), tmp_path),
    )


def plan(evidence: Evidence, budget: Budget, scheme: Scheme | None = None) -> Plan:
    return make_plan(SIZES, evidence, budget, source="tiny", scheme=scheme)


@pytest.mark.parametrize("bpw", [1.75, 2, 3, 4])
def test_all_schemes_fill_the_same_budget(evidence: Evidence, bpw: float) -> None:
    made = {scheme: plan(evidence, Budget(bpw=bpw), scheme) for scheme in SCHEMES}
    for found in made.values():
        assert 0.999 * bpw < found.bits_per_weight <= bpw
        assert found.n_weights == N_WEIGHTS
    losses = {scheme: found.kl for scheme, found in made.items()}
    assert all(loss is not None and loss > 0 for loss in losses.values())
    # The optimum under the curves; experts differ much here, so it is well below one rate for all.
    assert min(losses, key=lambda s: losses[s] or 0) == "sensitivity"
    assert (losses["sensitivity"] or 0) < 0.7 * (losses["uniform"] or 0)
    assert (losses["layer"] or 0) <= (losses["uniform"] or 0) * 1.001


@pytest.mark.parametrize("scheme", SCHEMES)
def test_limit_of_loss(evidence: Evidence, scheme: Scheme) -> None:
    limit = plan(evidence, Budget(bpw=3), scheme).kl
    assert limit is not None
    found = plan(evidence, Budget(max_kl=limit), scheme)
    assert found.kl is not None
    assert found.kl <= limit * (1 + 1e-9)
    assert found.bits_per_weight == pytest.approx(3, rel=2e-3)


def test_ratio_and_what_is_said(evidence: Evidence) -> None:
    found = plan(evidence, Budget(ratio=5))
    assert 5 <= found.ratio < 5.01
    assert found.budget == {"ratio": 5}
    assert found.made["bound_per"] == "matrix"
    assert found.made["sensitivity"]["task"] == "wordmath"
    assert len(found.made["profile"]["sha256"]) == 64


def test_all_at_once_is_not_the_sum(evidence: Evidence, tmp_path: Path) -> None:
    content = sensitivity(SIZES, by_role=True)
    alone = np.sum([entry["predicted_kl"] for entry in content["experts"]], axis=0)
    content["joint"] = {"bounds": BOUNDS, "measured_kl": (0.3 * alone).tolist()}
    known = Evidence(sensitivity=as_document(content, tmp_path))
    made, plain = plan(known, Budget(bpw=3)), plan(evidence, Budget(bpw=3))
    assert made.sha256 == plain.sha256
    assert made.kl == pytest.approx(0.3 * (plain.kl or 0), rel=0.02)
    again = plan(known, Budget(max_kl=made.kl))
    assert again.kl is not None
    assert made.kl is not None
    assert again.kl <= made.kl * (1 + 1e-9)
    assert again.bits_per_weight == pytest.approx(3, rel=2e-3)
    assert Plan.from_json(json.loads(made.to_bytes())) == made
    content["joint"]["measured_kl"] = [1.0]
    with pytest.raises(FormatError, match="joint: measured_kl: expected 4 numbers"):
        plan(Evidence(sensitivity=as_document(content, tmp_path)), Budget(bpw=3))


def test_bounds_follow_what_was_measured(evidence: Evidence) -> None:
    found = plan(evidence, Budget(bpw=3))
    for expert in found.experts:
        # down hurts six times as much as gate.
        assert expert.bounds["down"].value <= expert.bounds["gate"].value
        assert all((b.mode, b.scope) == ("rate", "expert") for b in expert.bounds.values())
    apart = [e.bounds["down"].value < e.bounds["gate"].value for e in found.experts]
    assert np.mean(apart) > 0.8  # the others are at the end of the grid
    whole = make_plan(SIZES, evidence, Budget(bpw=3), source="tiny", per_role=False)
    assert all(len(set(expert.bounds.values())) == 1 for expert in whole.experts)
    assert found.kl is not None
    assert whole.kl is not None
    assert found.kl < whole.kl


def test_frequent_experts_get_narrower_bounds(evidence: Evidence) -> None:
    only = Evidence(profile=evidence.profile)
    assert only.scheme == "frequency"
    found = make_plan(SIZES, only, Budget(bpw=3), source="tiny")
    assert found.kl is None
    assert evidence.profile is not None
    counts = evidence.profile.content["layers"][0]["counts"]
    rates = [found[ExpertKey(1, e)].bounds["gate"].value for e in range(16)]
    assert np.corrcoef(np.log(np.array(counts) + 1), np.log(rates))[0, 1] < -0.99


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(bpw=0.1), r"--bpw 0.1 .*smallest is \d+ bytes, (?P<n>[\d.]+) bits per weight"),
        (Budget(ratio=1000), r"--ratio 1000 .*, (?P<n>[\d.]+) times smaller"),
        (Budget(max_kl=1e-12), r"--max-kl 1e-12 cannot be met: .* predicted to lose"),
    ],
)
@pytest.mark.parametrize("scheme", ["uniform", "sensitivity"])
def test_budgets_that_cannot_be_met(
    budget: Budget, message: str, scheme: Scheme, evidence: Evidence
) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        plan(evidence, budget, scheme)
    match = re.search(message, str(caught.value))
    assert match is not None
    if "n" in match.groupdict():  # what it says is possible, is
        (name,) = budget.asked
        plan(evidence, Budget(**{name: float(match["n"])}), scheme)


def test_what_a_scheme_needs() -> None:
    with pytest.raises(PlanError, match=r"frequency.* give --profile"):
        make_plan(SIZES, Evidence(), Budget(bpw=3), source="x", scheme="frequency")
    with pytest.raises(PlanError, match="give --sensitivity or --study"):
        make_plan(SIZES, Evidence(), Budget(bpw=3), source="x", scheme="sensitivity")
    with pytest.raises(PlanError, match="give --sensitivity or --study"):
        make_plan(SIZES, Evidence(), Budget(max_kl=1), source="x")
    with pytest.raises(PlanError, match="expected one of bpw, ratio and max_kl"):
        Budget(bpw=3, ratio=2)
    assert make_plan(SIZES, Evidence(), Budget(bpw=3), source="x").scheme == "uniform"


def test_a_plan_comes_back_from_its_file(evidence: Evidence, tmp_path: Path) -> None:
    made = plan(evidence, Budget(bpw=3))
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    assert again.sha256 == made.sha256
    assert [f.name for f in tmp_path.glob("plan*")] == ["plan.json"]
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["predicted"]["bits_per_weight"] == made.bits_per_weight
    document["experts"][3]["bounds"]["up"]["value"] *= 1.0000001
    assert Plan.from_json(document).sha256 != made.sha256
    with pytest.raises(StoreError, match="nowhere"):
        made.save(tmp_path / "nowhere" / "plan.json")


def test_damaged_plans(evidence: Evidence, tmp_path: Path) -> None:
    good = plan(evidence, Budget(bpw=3)).to_json()
    first = good["experts"][0]
    for change, message in (
        ({"experts": []}, "without experts"),
        ({"experts": 3}, "experts: expected list"),
        ({"experts": [first, first]}, "layer 1 expert 0 is planned twice"),
        ({"experts": [{**first, "bounds": {}}]}, "bounds: expected one"),
        ({"experts": [{**first, "bounds": {"up": {"mode": "rate", "value": -1}}}]}, "BoundError"),
        ({"experts": [{**first, "layer": -1}]}, "layer: expected a whole number"),
        ({"method": None}, "method: expected str"),
        ({"version": 1}, "method: expected str"),
        ({"version": 4}, "version 4"),
        ({"joint": {"sums": [2, 1], "measured": [1, 2]}}, "joint: sums: expected ascending"),
    ):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(PlanError, match=rf"bad.json: .*{message}"):
            Plan.load(path)


def test_a_plan_fits_its_checkpoint_only(evidence: Evidence) -> None:
    made = plan(evidence, Budget(bpw=3))
    present = [(expert.key, expert.roles) for expert in SIZES]
    made.check(present)
    made.check([*present, (ExpertKey(1, 0, True), ("up",))])  # shared experts are not planned
    with pytest.raises(PlanError, match="lacks layer 9 expert 0"):
        made.check([*present, (ExpertKey(9, 0), ("up",))])
    with pytest.raises(PlanError, match="has layer 1 expert 0, layer 1 expert 1, which"):
        made.check(present[2:])
    with pytest.raises(PlanError, match="layer 1 expert 0 has down, gate_up, planned"):
        made.check([(SIZES[0].key, ("gate_up", "down")), *present[1:]])
    with pytest.raises(PlanError, match="layer 7 expert 7 is not in the plan"):
        made[ExpertKey(7, 7)]
    assert made.widest == ErrorBound(max(b.value for b in made.bounds), "rate", "expert")
    with pytest.raises(BoundError):
        ErrorBound(0.0)


def test_effective_rank() -> None:
    rng = np.random.default_rng(0)
    one = np.outer(rng.standard_normal(32), rng.standard_normal(16))
    assert effective_rank([one, one * 2]) == pytest.approx(1, abs=1e-3)
    q = np.linalg.qr(rng.standard_normal((32, 16)))[0]
    assert effective_rank([q]) == pytest.approx(16, rel=1e-4)
    # gate and up are [I, H], down is [H, I]: stacked along H, whichever way it lies.
    gate, up, down = (rng.standard_normal(s) for s in ((24, 16), (24, 16), (16, 24)))
    stacked = np.concatenate([gate, up, down.T])
    power = np.linalg.svd(stacked, compute_uv=False) ** 2
    share = power / power.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert effective_rank([gate, up, down]) == pytest.approx(expected, rel=1e-4)
    assert effective_rank([np.zeros((4, 4))]) == 1
    with pytest.raises(PlanError, match="share no axis"):
        effective_rank([np.zeros((4, 5)), np.zeros((6, 7))])
