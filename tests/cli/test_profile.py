"""`moebound profile` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moebound.cache.trace import load_trace
from moebound.profile.profile import Profile

from .conftest import SRC, Run


def test_everything_at_once(run: Run, tmp_path: Path) -> None:
    out, trace, figures = tmp_path / "p.json", tmp_path / "t.npz", tmp_path / "figures"
    ran = run("profile", SRC, "--task", "wordmath", "--task", "wordmath-hard", "--limit", 3,
              "-o", out, "--trace", trace, "--figures", figures, "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    document = ran.document
    assert document["ok"] is True
    assert document["format"] == "moebound.profile"
    assert len(document["layers"]) == 26
    assert set(document["layers"][0]["balance"]) == {
        "imbalance", "utilisation", "entropy", "gini", "peak_load"}  # fmt: skip
    assert [task["n_sequences"] for task in document["tasks"]] == [3, 3]
    profile = Profile.load(out)
    assert [layer.counts.tolist() for layer in profile.layers] == [
        layer["counts"] for layer in document["layers"]
    ]
    assert load_trace(trace).n_tokens == sum(task.n_tokens for task in profile.tasks)
    assert len(document["figures"]) == len(list(figures.iterdir())) == 12


def test_a_table_for_people(run: Run, tmp_path: Path) -> None:
    problems = tmp_path / "mine.jsonl"
    problem = {"prompt": "Ann has 3 books and gets 4 more. How many books? Answer as JSON.",
               "answer": "7"}  # fmt: skip
    problems.write_text(json.dumps(problem) + "\n")
    ran = run("profile", SRC, "--task", problems, "-o", tmp_path / "p.json")
    assert ran.code == 0, ran.stderr
    assert "1 prompts with answers of the model" in ran.stdout
    for word in ("imbalance", "utilisation", "entropy", "Gini", "most used"):
        assert word in ran.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "nothing"], "expected wordmath"),
        (["--task", "wordmath", "--task", "wordmath"], "each task once"),
        (["--task", "wordmath", "--limit", "0"], "limit"),
        (["--task", "lm-eval:arc_easy"], "lm-eval"),
        ([], "--task"),
    ],
)
def test_bad_requests(run: Run, tmp_path: Path, args: list[str], message: str) -> None:
    ran = run("profile", SRC, *args, "-o", tmp_path / "p.json")
    assert ran.code == 2
    assert message in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ran = run("profile", SRC, "--task", "wordmath", "-o", tmp_path / "nowhere" / "p.json")
    assert ran.code == 2
    assert "there is no folder" in ran.stderr
