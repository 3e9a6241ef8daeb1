"""`moebound sensitivity`: a map on disk, tables or JSON on stdout, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moebound.files.formats.sensitivity_map import SensitivityMap
from moebound.tasks import get_task
from untrained import untrained

from .conftest import Run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
def test_a_map(run: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    options = ["--task", "wordmath", "-o", out, "--rates", "0.8,0.3", "--limit", 3, "--sample", 5]
    ran = run("sensitivity", small, *options, "--json")
    assert ran.code == 0, ran.stderr
    found = SensitivityMap.load(out)
    assert found.bounds == (0.3, 0.8)
    assert (len(found.experts), found.n_prompts, found.task) == (16, 3, "wordmath")
    assert sum(line.measured_kl is not None for line in found.experts) == 5
    document = ran.document
    assert document["ok"] is True
    assert document["experts"] == 16
    assert document["checks"] == json.loads(json.dumps(found.checks))
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


def test_tables(run: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    ran = run("sensitivity", small, "--task", "wordmath", "-o", out, "--rates", "0.5",
              "--limit", 2, "--measure", "none")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert "16 at 1 bounds" in ran.stdout
    assert "all experts: predicted" in ran.stdout
    assert "layer 2" in ran.stderr


def test_problems_that_are_left_for_later(run: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    ran = run("sensitivity", small, "--task", "wordmath", "-o", out, "--rates", "0.5", "--skip", 3,
              "--limit", 2, "--measure", "none", "--ties", 0, "--tokens", "answers")  # fmt: skip
    assert ran.code == 0, ran.stderr
    found = SensitivityMap.load(out)
    tokenizer = AutoTokenizer.from_pretrained(small)
    read = get_task("wordmath").problems(5)[3:]
    # Every token of a solution, and the mark behind it.
    lengths = [len(tokenizer(p.reference, add_special_tokens=False)["input_ids"]) for p in read]
    assert (found.n_prompts, found.n_positions) == (2, sum(lengths) + 2)
    assert all(kl == 0 for line in found.experts for kl in line.flips_kl or ())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "nothing"], "nothing"),
        (["--task", "wordmath", "--rates", "0"], "0"),
        (["--task", "wordmath", "--codec", "nothing"], "nothing"),
        (["--task", "wordmath", "--measure", "some"], "some"),
    ],
)
def test_refused(run: Run, small: Path, tmp_path: Path, options: list[str], says: str) -> None:
    ran = run("sensitivity", small, "-o", tmp_path / "map.json", *options)
    assert ran.code == 2
    assert says in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(run: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "map.json"
    ran = run("sensitivity", small, "--task", "wordmath", "-o", out, "--limit", 1)
    assert ran.code == 2
    assert "nowhere" in ran.stderr
