"""Plans that were written once: they load for ever, and say the same."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from moebound.plan import Plan
from moebound.types import ExpertKey

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER, SECOND = FIXTURES / "v1", FIXTURES / "v2"
NAMES = ["by_matrix", "not_finite", "uniform"]
OF_2 = ["measured", "methods", "not_finite"]

every = pytest.mark.parametrize("name", NAMES)
every_2 = pytest.mark.parametrize("name", OF_2)


def expected(name: str, folder: Path = FOLDER) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "expected.json").read_bytes())[name]
    return found


@every
def test_the_bytes_are_those_that_were_written(name: str) -> None:
    data = (FOLDER / f"{name}.json").read_bytes()
    assert sha256(data).hexdigest() == expected(name)["file"]
    assert json.loads(data)["version"] == 1


@every
def test_a_plan_says_the_same_for_ever(name: str) -> None:
    """Beside the file's own JSON, which no code of ours has read."""
    file = FOLDER / f"{name}.json"
    plan = Plan.load(file)
    says: dict[str, Any] = json.loads(file.read_bytes())
    assert plan.sha256 == expected(name)["plan"]
    for field in ("codec", "scheme", "budget", "source", "source_bytes", "made"):
        assert getattr(plan, field) == says[field], field
    assert plan.n_bytes == says["predicted"]["bytes"]
    assert plan.bits_per_weight == pytest.approx(says["predicted"]["bits_per_weight"], rel=1e-12)
    assert plan.ratio == pytest.approx(says["predicted"]["ratio"], rel=1e-12)
    kl = says["predicted"]["kl"]
    assert plan.kl == (None if kl is None else pytest.approx(kl, rel=1e-12))
    assert list(plan.joint.sums) == says["joint"]["sums"]
    assert list(plan.joint.measured) == says["joint"]["measured"]
    assert len(plan.experts) == len(says["experts"])
    for entry in says["experts"]:
        expert = plan[ExpertKey(entry["layer"], entry["expert"], entry["shared"])]
        found = {
            role: {"mode": bound.mode, "value": bound.value, "scope": bound.scope}
            for role, bound in expert.bounds.items()
        }
        assert found == entry["bounds"]
        assert expert.n_weights == entry["n_weights"]
        assert expert.n_bytes == entry["predicted_bytes"]
        assert expert.kl == entry["predicted_kl"]


def test_what_was_measured() -> None:
    measured = Plan.load(FOLDER / "by_matrix.json").measured
    assert measured is not None
    assert (measured.kl, measured.stderr, measured.task) == (0.00213, 0.000321, "wordmath")
    assert (measured.n_problems, measured.score.exact, measured.n_tried) == (256, False, 3)
    broken = Plan.load(FOLDER / "not_finite.json").measured
    assert broken is not None
    assert broken.kl == math.inf
    assert math.isnan(broken.stderr)
    assert Plan.load(FOLDER / "uniform.json").measured is None


@every
def test_a_plan_written_again_is_the_same_plan(name: str, tmp_path: Path) -> None:
    """In whatever version is written now."""
    plan = Plan.load(FOLDER / f"{name}.json")
    plan.save(tmp_path / "again.json")
    again = Plan.load(tmp_path / "again.json")
    assert again.sha256 == plan.sha256
    assert again.experts == plan.experts
    assert again.joint == plan.joint


@every_2
def test_a_plan_of_version_2_says_the_same_for_ever(name: str, tmp_path: Path) -> None:
    file = SECOND / f"{name}.json"
    assert sha256(file.read_bytes()).hexdigest() == expected(name, SECOND)["file"]
    says: dict[str, Any] = json.loads(file.read_bytes())
    assert says["version"] == 2
    plan = Plan.load(file)
    plan.save(tmp_path / "again.json")
    for found in (plan, Plan.load(tmp_path / "again.json")):
        assert found.sha256 == expected(name, SECOND)["plan"]
        assert found.method == says["method"]
        for entry in says["experts"]:
            key = ExpertKey(entry["layer"], entry["expert"], entry["shared"])
            assert found[key].to_json() == entry


def test_what_was_measured_by_version_2_is_of_answers(tmp_path: Path) -> None:
    plan = Plan.load(SECOND / "measured.json")
    plan.save(tmp_path / "again.json")
    for found in (plan.measured, Plan.load(tmp_path / "again.json").measured):
        assert found is not None
        assert found.tokens == "answers"
        assert (found.kl, found.stderr) == (0.00213, 0.000321)
        assert (found.score.kl_nats, found.score.kl_stderr) == (0.04, 0.001)
    broken = Plan.load(SECOND / "not_finite.json").measured
    assert broken is not None
    assert broken.kl == math.inf


def test_no_plan_without_a_name() -> None:
    for folder, names in ((FOLDER, NAMES), (SECOND, OF_2)):
        assert sorted(file.stem for file in folder.iterdir()) == sorted([*names, "expected"])
