"""Trying a plan on the model: the KL of the store it would make, on problems that the map left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_bits import all_bits, changed
from moebound.checkpoint import open_checkpoint
from moebound.errors import MoeboundError, PlanError, TaskError
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.text import solved_rows
from moebound.plan import Budget, Document, Evidence, Plan, make_plan
from moebound.sensitivity import trial as trial_module
from moebound.sensitivity.trial import Trial, check_memory, unread
from moebound.store import compress, measure_sizes
from moebound.tasks import get_task
from untrained import untrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("trial") / "model")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    sizes = measure_sizes(open_checkpoint(folder), jobs=1)
    return make_plan(sizes, Evidence(), Budget(bpw=3), source="model")


def a_map(**content: Any) -> Document:
    return Document(Path("map.json"), {"task": "wordmath", **content}, "0" * 64)


def test_it_is_the_kl_of_the_store(
    folder: Path, loaded: Loaded, plan: Plan, tmp_path: Path
) -> None:
    before = all_bits(loaded.model)
    task, problems = unread(a_map(skip=2, n_prompts=3), 4)
    found = Trial.of(loaded, task, problems).measure(plan)
    answers = Trial.of(loaded, task, problems, tokens="answers").measure(plan)
    assert not changed(before, loaded.model)
    compress(open_checkpoint(folder), tmp_path / "store", bound=plan)
    text = Baseline.of(loaded.model, solved_rows(loaded.tokenizer, task, task.problems(9)[5:]))
    want = text.compare(load(tmp_path / "store").model)
    assert found.kl == pytest.approx(want.kl_nats, rel=1e-9)
    assert found.stderr == pytest.approx(want.kl_stderr, rel=1e-9)
    assert answers.kl == pytest.approx(want.answer_kl_nats, rel=1e-9)
    assert found.score.answer_kl_stderr == pytest.approx(want.answer_kl_stderr, rel=1e-9)
    assert found.score.kl_nats == pytest.approx(want.kl_nats, rel=1e-9)
    assert found.kl > 0
    assert (found.task, found.n_problems, found.n_tried) == ("wordmath", 4, 1)


def test_another_models_plan(loaded: Loaded, plan: Plan) -> None:
    trial = Trial.of(loaded, get_task("wordmath"), get_task("wordmath").problems(1))
    short = replace(plan, experts=plan.experts[:-1])
    with pytest.raises(MoeboundError, match=f"nothing planned for {plan.experts[-1].key}"):
        trial.measure(short)


def test_problems_that_the_map_did_not_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "answer": f"{n}"}) + "\n" for n in range(10))
    )

    def left(skip: int, n_read: int, wanted: int) -> list[str]:
        task, problems = unread(a_map(task=str(path), skip=skip, n_prompts=n_read), wanted)
        assert task.name == str(path)
        return [problem.answer for problem in problems]

    assert left(0, 3, 4) == ["3", "4", "5", "6"]
    assert left(2, 6, 4) == ["8", "9", "0", "1"]
    assert left(2, 6, 99) == ["8", "9", "0", "1"]
    with pytest.raises(PlanError, match=r"map.json: was made with all 10 problems .*--limit"):
        left(0, 10, 4)


@pytest.mark.parametrize(
    "missing", [{}, {"skip": 0}, {"n_prompts": 3}, {"skip": None, "n_prompts": 3}]
)
def test_a_map_that_does_not_say(missing: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"map.json: does not say which problems"):
        unread(a_map(**missing), 4)
    with pytest.raises(TaskError, match="nothing"):
        unread(a_map(task="nothing", skip=0, n_prompts=1), 4)


def test_a_model_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)
    check_memory(checkpoint)
    n_weights = sum(parameter.numel() for parameter in load(folder).model.parameters())
    n_experts = sum(expert.size for expert in checkpoint.experts())
    needed = 4 * (n_weights + n_experts)
    monkeypatch.setattr(trial_module, "available_memory", lambda device: int(1.05 * needed))
    check_memory(checkpoint)
    monkeypatch.setattr(trial_module, "available_memory", lambda device: int(0.95 * needed))
    with pytest.raises(PlanError, match=r"measuring a plan takes .* GiB .* are free"):
        check_memory(checkpoint)
