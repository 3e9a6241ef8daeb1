"""A profile from a model and tasks: what was recorded is what answering chooses; runs go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebound.cache.trace import load_trace
from moebound.errors import MoeboundError
from moebound.evaluate.answering import answer
from moebound.evaluate.loading import Loaded, load
from moebound.profile import profiling
from moebound.profile.profile import Profile, TaskUse
from moebound.profile.profiling import profile_tasks
from moebound.profile.routing import Recorder
from moebound.tasks import get_task
from moebound.tasks.base import Problem, Task

EASY = get_task("wordmath")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.set_num_threads(1)
    return load("builtin:wordmath")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "PART", 3)


def asked(n: int, *names: str) -> list[tuple[Task, list[Problem]]]:
    return [(task, task.problems(n)) for task in map(get_task, names or ("wordmath",))]


def counts(profile: Profile) -> list[list[int]]:
    return [layer.counts.tolist() for layer in profile.layers]


def test_what_is_read_chooses_what_answering_chose(loaded: Loaded, tmp_path: Path) -> None:
    """Beside the recorder on transformers' own generation, one problem at a time."""
    profile_tasks(loaded, asked(4), tmp_path / "p.json", trace=tmp_path / "t.npz")
    trace = load_trace(tmp_path / "t.npz")
    for sequence, problem in enumerate(EASY.problems(4)):
        inputs = loaded.tokenizer(problem.prompt, return_tensors="pt")
        with torch.inference_mode(), Recorder(loaded.model) as recorder:
            loaded.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                max_new_tokens=EASY.max_new_tokens, do_sample=False,
            )  # fmt: skip
        alone = recorder.take()
        mine = trace.sequence == sequence
        for name in ("token", "position", "decode"):
            np.testing.assert_array_equal(getattr(trace, name)[mine], getattr(alone, name))
        steps = trace.step[mine]
        np.testing.assert_array_equal(steps - steps[0], alone.step)
        for one, other in zip(trace.layers, alone.layers, strict=True):
            same = np.sort(one.index[mine], 1) == np.sort(other.index, 1)
            assert same.mean() > 0.995  # a tie of two experts may fall either way


def test_the_profile_counts_the_trace(loaded: Loaded, tmp_path: Path) -> None:
    found = profile_tasks(
        loaded, asked(4, "wordmath", "wordmath-hard"), tmp_path / "p.json",
        trace=tmp_path / "t.npz",
    )  # fmt: skip
    trace = load_trace(tmp_path / "t.npz")
    whole = TaskUse.of(trace, task="both", text="answers")
    assert counts(found) == [layer.counts.tolist() for layer in whole.layers]
    for mine, counted in zip(found.layers, whole.layers, strict=True):
        np.testing.assert_allclose(mine.weight_sums, counted.weight_sums, rtol=1e-3)
        assert mine.counts.sum() == 6 * trace.n_tokens
    assert [(use.task, use.n_sequences) for use in found.tasks] == [
        ("wordmath", 4), ("wordmath-hard", 4)]  # fmt: skip
    assert sum(use.n_tokens for use in found.tasks) == trace.n_tokens
    assert sum(use.n_decoded for use in found.tasks) == trace.decode.sum()
    assert trace.n_sequences == 8
    assert (np.diff(trace.step) >= 0).all()
    assert Profile.load(tmp_path / "p.json").to_json() == found.to_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "t.npz"]


def test_answers_are_those_of_eval(loaded: Loaded, tmp_path: Path) -> None:
    found = profile_tasks(loaded, asked(5), tmp_path / "p.json")
    outputs = answer(loaded, EASY, EASY.problems(5))
    assert found.tasks[0].n_decoded == sum(output.n_tokens for output in outputs)


def test_solutions_are_read_without_generating(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "decode", None)
    found = profile_tasks(loaded, asked(3), tmp_path / "p.json", text="references")
    solutions = loaded.tokenizer([p.reference for p in EASY.problems(3)], add_special_tokens=False)
    assert found.tasks[0].text == "references"
    assert found.tasks[0].n_decoded == sum(map(len, solutions["input_ids"]))


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = asked(4, "wordmath", "wordmath-hard")
    wanted = profile_tasks(loaded, work, tmp_path / "a.json", trace=tmp_path / "a.npz")
    real, parts = profiling._rows, 0

    def rows(*args: Any) -> Any:
        nonlocal parts
        parts += 1
        if parts in (2, 4):
            raise Killed
        return real(*args)

    monkeypatch.setattr(profiling, "_rows", rows)
    for _ in range(2):
        with pytest.raises(Killed):
            profile_tasks(loaded, work, tmp_path / "b.json", trace=tmp_path / "b.npz")
        assert not (tmp_path / "b.json").exists()
    found = profile_tasks(loaded, work, tmp_path / "b.json", trace=tmp_path / "b.npz")
    assert parts == 4 + 2  # none twice but those that were killed
    assert found.to_json() == wanted.to_json()
    one, other = load_trace(tmp_path / "a.npz"), load_trace(tmp_path / "b.npz")
    np.testing.assert_array_equal(one.token, other.token)
    np.testing.assert_array_equal(one.layers[3].index, other.layers[3].index)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json", "a.npz", "b.json", "b.npz"]  # fmt: skip


@pytest.mark.parametrize("leftover", ["other", "torn", "foreign"])
def test_what_another_run_left_is_not_gone_on_from(
    loaded: Loaded, tmp_path: Path, leftover: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.json"
    wanted = profile_tasks(loaded, asked(3), out)
    out.unlink()
    path = out.with_name("p.json.partial")
    if leftover == "other":

        def killed(*args: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(profiling._State, "finish", killed)
            with pytest.raises(Killed):
                profile_tasks(loaded, asked(3), out, text="references")
        assert path.exists()
    else:
        path.write_text('{"settings": ' if leftover == "torn" else "[]")
    assert profile_tasks(loaded, asked(3), out).to_json() == wanted.to_json()


def test_no_problems(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="'wordmath': no problems"):
        profile_tasks(loaded, [(EASY, [])], tmp_path / "p.json")
