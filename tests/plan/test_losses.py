"""From measurements at a few rates to losses at all; and what is wrong with damaged ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.errors import FormatError, MoeboundError, PlanError
from moebound.files.formats.sensitivity_map import FORMAT
from moebound.files.formats.study import Row, read_rows
from moebound.plan import RATES, Budget, Evidence, curves_from_study, make_plan
from moebound.plan.items import LOSS_FLOOR
from moebound.plan.losses import (
    exponent,
    from_errors,
    from_sensitivity,
    from_study,
    power_law,
    shares_from_profile,
)
from moebound.types import ExpertKey

from .conftest import BOUNDS, as_document, as_map, experts, profile, sensitivity


@given(power=st.floats(0.5, 3), c=st.floats(1e-9, 1))
def test_a_power_law_is_found_again(power: float, c: float) -> None:
    measured = np.array(BOUNDS)
    loss = c * measured[None] ** power
    assert exponent(measured, loss) == pytest.approx(power)
    at = np.array([0.05, 0.1, 0.2, 0.7, 1.6])
    found = power_law(measured, loss, at)[0]
    # Inside, the data's own power; beyond, the square, which second order theory asks for.
    assert found[1:4] == pytest.approx(c * at[1:4] ** power)
    assert found[0] == pytest.approx(loss[0, 0] / 4)
    assert found[4] == pytest.approx(loss[0, -1] * 4)


def test_no_loss_and_one_rate() -> None:
    assert power_law(np.array(BOUNDS), np.zeros((1, 4)), RATES).tolist() == [[0.0] * len(RATES)]
    one = power_law(np.array([0.1]), np.array([[1e-3]]), np.array([0.05, 0.2]))
    assert one[0] == pytest.approx([2.5e-4, 4e-3])
    assert exponent(np.array([0.1]), np.array([[1e-3]])) is None


def test_losses_never_fall_and_none_is_free(tmp_path: Path) -> None:
    sizes = experts()
    content = sensitivity(sizes)
    content["experts"][0]["predicted_kl"] = [0.0, 0.0, 0.0, 0.0]
    content["experts"][1]["predicted_kl"] = [0.2, 0.1, 0.3, 0.2]
    items, _ = from_sensitivity(as_map(content, tmp_path), sizes, per_role=False)
    assert items.loss is not None
    assert (np.diff(items.loss, axis=1) >= 0).all()
    assert items.loss[0] == pytest.approx(LOSS_FLOOR * items.loss[:4].mean(axis=0), rel=0.02)


def test_predictions_are_brought_to_the_measured_level(tmp_path: Path) -> None:
    sizes = experts()
    plain, facts = from_sensitivity(as_map(sensitivity(sizes), tmp_path), sizes, per_role=False)
    assert facts["experts_measured"] == 0
    assert facts["loss_exponent"] == pytest.approx(2)
    content = sensitivity(sizes, measured=3.0)
    for entry in content["experts"][1::2]:  # a sample was measured
        entry["measured_kl"] = None
    level, facts = from_sensitivity(as_map(content, tmp_path), sizes, per_role=False)
    assert facts["experts_measured"] == 6
    assert plain.loss is not None
    assert level.loss == pytest.approx(3 * plain.loss)


def test_by_role_adds_up_and_fused_matrices_are_found(tmp_path: Path) -> None:
    sizes = experts()
    found = as_map(sensitivity(sizes, by_role=True), tmp_path)
    whole, _ = from_sensitivity(found, sizes, per_role=False)
    apart, _ = from_sensitivity(found, sizes, per_role=True)
    assert apart.roles[:3] == (("gate",), ("up",), ("down",))
    assert apart.loss is not None
    assert apart.loss.reshape(-1, 3, len(RATES)).sum(axis=1) == pytest.approx(whole.loss)
    fused = [
        type(e)(e.key, {"gate_up": 4096, "down": 2048},
                {"gate_up": e.sizes["gate"] + e.sizes["up"], "down": e.sizes["down"]},
                e.n_bytes, e.mean_abs)
        for e in sizes
    ]  # fmt: skip
    items, _ = from_sensitivity(found, fused, per_role=True)
    assert items.loss is not None
    assert items.loss[0] == pytest.approx(apart.loss[0] + apart.loss[1])


def drop_expert(content: dict[str, Any]) -> None:
    del content["experts"][5]


def other_model(content: dict[str, Any]) -> None:
    content["experts"][2]["mean_abs"] *= 1.01


def short_list(content: dict[str, Any]) -> None:
    content["experts"][0]["predicted_kl"] = [0.1]


def not_a_number(content: dict[str, Any]) -> None:
    content["experts"][0]["predicted_kl"][1] = None


def descending(content: dict[str, Any]) -> None:
    content["bounds"].reverse()


def no_experts(content: dict[str, Any]) -> None:
    content["experts"] = {"a": 1}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop_expert, PlanError, "no sensitivity of layer 2 expert 1"),
        (other_model, PlanError, "layer 1 expert 2 .* another model"),
        (short_list, FormatError, "layer 1 expert 0: predicted_kl: expected 4 numbers"),
        (not_a_number, FormatError, "expected a finite number, found None"),
        (descending, FormatError, "bounds: expected ascending numbers"),
        (no_experts, FormatError, "experts: expected a list"),
    ],
)
def test_damaged_sensitivity(
    damage: Callable[[dict[str, Any]], None],
    error: type[MoeboundError],
    message: str,
    tmp_path: Path,
) -> None:
    sizes = experts()
    content = copy.deepcopy(sensitivity(sizes))
    damage(content)
    evidence = Evidence(sensitivity=as_document(content, tmp_path))
    with pytest.raises(error, match=rf"moebound.sensitivity.json: .*{message}"):
        make_plan(sizes, evidence, Budget(bpw=3), source="tiny")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "not JSON"), ("[]", "expected format"), ('{"format": "moebound.plan"}', "found"),
        ('{"format": "moebound.sensitivity", "version": 9}', "version 9"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(FormatError, match=message):
            FORMAT.read(path)
    with pytest.raises(FormatError, match=r"none.json: cannot be read"):
        FORMAT.read(tmp_path / "none.json")


def a_row(layer: int | None, source: str, rate: float, kl: float, seed: int = 0) -> dict[str, Any]:
    found = {"condition": f"{layer}/{source}/{rate}/{seed}", "task": "t", "layers": [layer or 9],
             "source": source, "rate": rate, "seed": seed, "kl": kl}  # fmt: skip
    return found if layer is None else {**found, "layer": layer}


@pytest.fixture
def rows(tmp_path: Path) -> Sequence[Row]:
    made = [
        a_row(1, "bound", 0.1, 0.001),
        a_row(1, "bound", 0.8, 0.064),
        a_row(1, "gaussian", 0.8, 9.0),
        a_row(3, "bound", 0.8, 0.01),
        a_row(3, "bound", 0.8, 0.03, seed=1),
        a_row(None, "bound", 0.8, 5.0),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return read_rows(tmp_path)


def test_a_studys_layers(rows: Sequence[Row]) -> None:
    assert curves_from_study(rows) == {1: {0.1: 0.001, 0.8: 0.064}, 3: {0.8: 0.02}}
    assert curves_from_study(rows[2:3]) == {1: {0.8: 9.0}}
    with pytest.raises(PlanError, match="no condition that changes a whole layer"):
        curves_from_study(rows[5:])


def test_a_layers_loss_is_divided_among_its_experts(rows: Sequence[Row], tmp_path: Path) -> None:
    sizes = experts()
    items, facts = from_study(rows, sizes)
    assert facts == {"study_layers": [1, 3]}
    assert items.loss is not None
    by_layer = items.loss.reshape(3, 4, -1).sum(axis=1)
    at = items.loss_at(np.full(12, 0.8))
    assert at is not None
    assert at.reshape(3, 4).sum(axis=1)[[0, 2]] == pytest.approx([0.064, 0.02], rel=1e-3)
    assert ((by_layer[1] - by_layer[0]) * (by_layer[1] - by_layer[2]) <= 0).all()
    share = shares_from_profile(as_document(profile(sizes), tmp_path), [e.key for e in sizes])
    uneven, _ = from_study(rows, sizes, share=share)
    assert uneven.loss is not None
    ratio = uneven.loss[0] / uneven.loss[1]
    assert ratio == pytest.approx(share[ExpertKey(1, 0)] / share[ExpertKey(1, 1)])


def test_rows_of_a_killed_study(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    one, other = (json.dumps(a_row(layer, "bound", 0.3, 0.1)) for layer in (1, 2))
    path.write_text(f"{one}\n{other}\n{one[:9]}")
    assert [row.layer for row in read_rows(tmp_path)] == [1, 2]
    path.write_text(f"{one[:9]}\n{other}\n")
    with pytest.raises(FormatError, match="line 1: not JSON"):
        read_rows(tmp_path)
    path.write_text("")
    with pytest.raises(PlanError, match="no condition that changes a whole layer"):
        curves_from_study(read_rows(tmp_path))


def test_shares(tmp_path: Path) -> None:
    sizes = experts()
    content = profile(sizes)
    content["layers"][0]["counts"] = [0, 0, 6, 0]
    keys = [expert.key for expert in sizes]
    share = shares_from_profile(as_document(content, tmp_path), keys)
    assert [share[ExpertKey(1, e)] for e in range(4)] == [0.1, 0.1, 0.7, 0.1]
    content["layers"][1]["counts"] = [1, 2]
    with pytest.raises(PlanError, match="no counts of layer 2 expert 2, layer 2 expert 3"):
        shares_from_profile(as_document(content, tmp_path), keys)


def test_what_an_error_costs(tmp_path: Path) -> None:
    """Of a method that a map has not measured: as much as the same error of codec `bound`."""
    sizes = [
        replace(
            expert,
            errors=dict.fromkeys(expert.roles, 3.0 * expert.rates**2),
            plain={role: np.array(BOUNDS) ** 2 for role in expert.roles},
        )
        for expert in experts(2, 3)
    ]
    found = as_map(sensitivity(sizes, by_role=True), tmp_path)
    for per_role in (False, True):
        mine, facts = from_errors(found, sizes, per_role=per_role)
        theirs, _ = from_sensitivity(found, sizes, per_role=per_role)
        assert mine.loss is not None
        assert theirs.loss is not None
        assert mine.loss == pytest.approx(3 * theirs.loss, rel=1e-6)
        assert "by errors" in facts["losses"]
    # Half the error of one expert is half its loss, and a plan gives it a wider bound.
    quiet = [
        replace(e, errors={role: values / 8 for role, values in e.errors.items()}) if not i else e
        for i, e in enumerate(sizes)
    ]
    evidence = Evidence(sensitivity=as_document(sensitivity(sizes, by_role=True), tmp_path))
    plans = [
        make_plan(some, evidence, Budget(bpw=3), source="x", method="calibrated")
        for some in (sizes, quiet)
    ]
    assert plans[0].scheme == "sensitivity"
    rates = [plan[sizes[0].key].bounds["up"].value for plan in plans]
    assert rates[1] > rates[0]
    with pytest.raises(PlanError, match="there are none of method 'calibrated'"):
        make_plan(
            experts(2, 3), evidence, Budget(bpw=3), source="x", method="calibrated",
            scheme="sensitivity",
        )  # fmt: skip
