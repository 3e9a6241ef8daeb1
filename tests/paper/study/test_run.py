"""A study: the same rows whatever stops it, nothing measured twice, a model that stays as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_bits import all_bits, changed
from moebound.errors import FormatError, MoeboundError
from moebound.files.formats.study import Condition
from moebound.jobs.workers import InProcess, Processes
from moebound.paper.study.measure import Measured, Measurer, Setup
from moebound.paper.study.run import Outcome, Step, run_study
from moebound.paper.study.suite import Suite
from moebound.profile.profile import Profile
from moebound.score import Score
from moebound.sensitivity.perturb import Realised

from .conftest import LAYERS, N_PROBLEMS, small_suite, timeless


def study(folder: Path, suite: Suite, setup: Setup, workers: Any, **options: Any) -> Outcome:
    return run_study(folder, suite, setup, workers, task_names=["wordmath"], **options)


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["condition"] for row in rows}) == len(rows), "a condition twice"
    return {row["condition"]: timeless(row) for row in rows}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, suite: Suite, setup: Setup, measurer: Measurer
) -> Path:
    """A study that nothing disturbed; the weights are looked at before and after."""
    folder = tmp_path_factory.mktemp("whole")
    before = all_bits(measurer._loaded.model)
    outcome = study(folder, suite, setup, InProcess(measurer))
    assert not changed(before, measurer._loaded.model)
    assert outcome.n_measured == len(outcome.asked.conditions)
    return folder


class Killed(BaseException):
    """Stands for whatever ends a run at once."""


class DiesAfter(InProcess):
    """Works for so many conditions, and counts them."""

    def __init__(self, measurer: Measurer, n: int) -> None:
        super().__init__(measurer)
        self.n, self.measured = n, list[str]()

    def run(self, conditions: Any, profile: Any) -> Any:
        for measured in super().run(conditions, profile):
            if len(self.measured) == self.n:
                raise Killed
            self.measured.append(measured.row["condition"])
            yield measured


def test_every_row_says_what_was_measured(whole: Path) -> None:
    document = json.loads((whole / "study.json").read_text())
    rows = rows_of(whole)
    assert (document["format"], document["version"]) == ("moebound.study", 1)
    assert tuple(document["layers"]) == LAYERS
    assert document["conditions"][0]["id"] == "wordmath/baseline"
    assert rows.keys() == {condition["id"] for condition in document["conditions"]}
    for condition in document["conditions"]:
        row = rows[condition["id"]]
        for name in ("task", "table", "selector", "source", "rate", "seed"):
            assert row[name] == condition[name]
        assert row["n_positions"] > 0
        assert 0 <= row["top1"] <= 1
        score = Score.from_json(row["score"])
        assert (score.answer_kl_nats, score.answer_top1_agreement) == (row["kl"], row["top1"])
        assert (score.n_answer_tokens, score.exact) == (row["n_positions"], True)
        assert (score.n_tokens or 0) > row["n_positions"]
        assert len(row["where"]["residual"]) == 4
        assert len(row["where"]["routing"]) == len(LAYERS)
        if condition["answers"]:
            assert row["n"] == N_PROBLEMS
            for name in ("ica", "pia"):
                assert int(row["right"][name], 16).bit_count() == row[name] <= row["valid"]
        else:
            assert (row["n"], row["ica"], row["right"]) == (0, None, None)
        if row["source"] == "none":
            assert (row["kl"], row["top1"], row["realised"], row["layers"]) == (0, 1, None, [])
        else:
            assert row["kl"] > 0
            assert Realised.from_json(row["realised"]).n_experts == row["experts_changed"] > 0


def test_layers_in_front_of_an_error_do_not_feel_it(whole: Path) -> None:
    row = rows_of(whole)["wordmath/7/group:1-3/gaussian-sd/0.5/0"]
    assert row["layers"] == [1, 2, 3]
    assert row["where"]["residual"][0] == 0  # decoder layer 0 is dense
    assert row["where"]["routing"][0] == 0  # the first changed layer decides as before
    assert min(row["where"]["residual"][1:]) > 0


def test_whole_layers_are_marked_for_plans(whole: Path) -> None:
    marked = {row["layer"] for row in rows_of(whole).values() if "layer" in row}
    assert marked == {1}
    assert all("layer" in r for r in rows_of(whole).values() if r["selector"] == "layer:1")


def test_answers_are_kept(whole: Path) -> None:
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    answered = {key for key, row in rows_of(whole).items() if row["n"]}
    assert {entry["condition"] for entry in answers} == answered
    assert all(len(entry["answers"]) == N_PROBLEMS for entry in answers)


def test_most_used_is_by_the_profile_beside(whole: Path) -> None:
    profile = Profile.load(whole / "profile.json")
    row = rows_of(whole)["wordmath/3/most-used:1/codec:bound/0.3/0"]
    assert row["experts_changed"] == 1
    assert [use.task for use in profile.tasks] == ["wordmath"]
    assert profile.layer(1).counts.sum() > 0


@pytest.mark.parametrize("n", [1, 5])
def test_a_killed_study_goes_on(
    n: int, whole: Path, tmp_path: Path, suite: Suite, setup: Setup, measurer: Measurer
) -> None:
    first, second = DiesAfter(measurer, n), DiesAfter(measurer, 1000)
    with pytest.raises(Killed):
        study(tmp_path, suite, setup, first)
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"condition": "wordmath/3/most-')  # torn while it was written
    outcome = study(tmp_path, suite, setup, second)
    assert outcome.n_found == n
    assert not set(first.measured) & set(second.measured)
    assert rows_of(tmp_path) == rows_of(whole)
    third = DiesAfter(measurer, 0)  # a finished study measures nothing
    assert study(tmp_path, suite, setup, third).n_measured == 0


def test_an_error_inside_of_a_condition_leaves_the_model_alone(
    tmp_path: Path, suite: Suite, setup: Setup, measurer: Measurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = all_bits(measurer._loaded.model)
    original = Measurer._answers

    def interrupted(self: Measurer, task: str) -> list[str]:
        if changed(before, self._loaded.model):
            raise KeyboardInterrupt
        return original(self, task)

    monkeypatch.setattr(Measurer, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, suite, setup, InProcess(measurer))
    assert not changed(before, measurer._loaded.model)
    assert "wordmath/baseline" in rows_of(tmp_path)


def test_a_study_may_grow_and_not_shrink(
    whole: Path, tmp_path: Path, suite: Suite, setup: Setup, workers: InProcess
) -> None:
    few = small_suite(("gaussian-sd",), n_seeds=1)
    begun = study(tmp_path, few, setup, workers)
    grown = study(tmp_path, suite, setup, workers)
    assert grown.n_found == begun.n_measured
    assert rows_of(tmp_path) == rows_of(whole)
    with pytest.raises(MoeboundError, match="not asked for now, such as"):
        study(tmp_path, few, setup, workers)


def test_a_folder_of_another_study_is_refused(
    whole: Path, suite: Suite, setup: Setup, workers: InProcess
) -> None:
    with pytest.raises(MoeboundError, match="suite is 'small' there and 'other' now"):
        study(whole, replace(suite, name="other"), setup, workers)
    with pytest.raises(MoeboundError, match="n_problems is 5 there and 4 now"):
        study(whole, suite, replace(setup, n_problems=4), workers)


def test_a_folder_of_another_model_is_refused(
    whole: Path, suite: Suite, setup: Setup, measurer: Measurer
) -> None:
    class Other(InProcess):
        def call(self, method: str, *args: Any) -> Any:
            found = super().call(method, *args)
            return replace(found, fingerprint="f00") if method == "facts" else found

    with pytest.raises(MoeboundError, match=r"fingerprint is .* there and 'f00' now"):
        study(whole, suite, setup, Other(measurer))


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"format": "moebound.plan"}'])
def test_a_file_that_is_no_study_is_refused(
    content: bytes, tmp_path: Path, suite: Suite, setup: Setup, workers: InProcess
) -> None:
    (tmp_path / "study.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"study\.json"):
        study(tmp_path, suite, setup, workers)


def test_progress_counts_down(
    tmp_path: Path, suite: Suite, setup: Setup, workers: InProcess
) -> None:
    steps: list[Step] = []
    study(tmp_path, suite, setup, workers, say=steps.append)
    assert [step.done for step in steps] == list(range(len(steps)))
    assert steps[0].left_s is None
    assert all(step.left_s is not None and step.left_s > 0 for step in steps[1:-1])
    assert (steps[-1].done, steps[-1].left_s) == (steps[-1].total, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_processes_give_the_same_rows(
    whole: Path, tmp_path: Path, suite: Suite, setup: Setup
) -> None:
    with Processes(setup, 2) as workers:
        study(tmp_path, suite, setup, workers)
    ours, theirs = rows_of(whole), rows_of(tmp_path)
    assert ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert theirs[key].pop("kl") == pytest.approx(row["kl"], rel=1e-6, abs=1e-9)
        assert theirs[key] == {name: value for name, value in row.items() if name != "kl"}


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_what_a_worker_raises_arrives_and_its_death_is_told(setup: Setup) -> None:
    bad = Condition(
        "x", "extra", "", "expert:9:0", "uniform", 0.3, "expert", 0, "wordmath", answers=False
    )
    with Processes(setup, 1) as workers:
        with pytest.raises(MoeboundError, match="layer 9 has no"):
            workers.call("run", bad)
        workers._workers[0]._process.kill()
        with pytest.raises(MoeboundError, match=r"worker 0 ended with exit code -9.*goes on"):
            workers.call("facts")


def test_numbers_that_are_none_any_more_are_null(measurer: Measurer, setup: Setup) -> None:
    huge = Condition(
        "x", "extra", "", "layer:1", "uniform", 1e38, "expert", 0, "wordmath", answers=False
    )
    measured = measurer.run(huge)
    assert isinstance(measured, Measured)
    json.dumps(measured.row, allow_nan=False)
    assert measured.row["kl"] is None or measured.row["kl"] > 0
