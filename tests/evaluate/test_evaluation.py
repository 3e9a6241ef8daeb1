"""Scores, "/", and answers that outlive a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebound.errors import FormatError, TaskError
from moebound.evaluate import scoring
from moebound.evaluate.answering import Output
from moebound.evaluate.evaluation import Evaluation, Scored, compare_to, tally
from moebound.evaluate.loading import Loaded
from moebound.evaluate.scoring import evaluate
from moebound.evaluate.transcript import read_transcript, rescore
from moebound.tasks import get_task


def scored(name: int, *, pia: bool = True, ica: bool = False, valid: bool = True) -> Scored:
    return Scored(str(name), "boxed" if name % 2 else "json", ica, pia, valid, valid, 5, "1")


def test_down_means_that_nearly_nothing_is_valid() -> None:
    alive = [scored(n, valid=n < 10) for n in range(100)]
    assert not tally(alive).down
    assert tally(alive[1:]).down
    assert not tally([]).down
    counts = tally(alive)
    assert (counts.n, counts.valid, counts.unfinished) == (100, 10, 90)
    assert counts.pia_share.value == 1


def test_formats_add_up() -> None:
    found = Evaluation({}, "t", tuple(scored(n, ica=n > 5) for n in range(11)))
    assert {name: one.n for name, one in found.by_format.items()} == {"boxed": 5, "json": 6}
    assert sum(one.ica for one in found.by_format.values()) == found.total.ica == 5
    assert json.loads(json.dumps(found.to_json()))["total"]["n"] == 11


def test_comparison_is_on_the_problems_of_both() -> None:
    before = Evaluation({}, "t", tuple(scored(n) for n in range(10)))
    after = Evaluation({}, "t", tuple(scored(n, pia=n > 5) for n in range(4, 14)))
    compared = compare_to(before, after)
    assert (compared.pia.n, compared.pia.lost, compared.pia.gained) == (6, 2, 0)
    assert compared.ica.p == 1


def test_answers_are_kept_and_gone_on_with(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, path = get_task("wordmath"), tmp_path / "answers.jsonl"
    whole = evaluate(loaded, task, limit=12)
    real: Any = vars(scoring)["answer_in_batches"]
    asked: list[int] = []

    def counting(loaded: Loaded, task: Any, problems: Any, **options: Any) -> Any:
        asked.append(len(problems))
        return real(loaded, task, problems, **options)

    monkeypatch.setattr(scoring, "answer_in_batches", counting)
    evaluate(loaded, task, limit=8, batch=4, answers=path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    path.write_bytes(b"".join(lines[:6]) + lines[6][:20])  # killed while it wrote the sixth answer
    again = evaluate(loaded, task, limit=12, answers=path)
    assert asked == [8, 7]
    assert again == whole
    assert len(path.read_bytes().splitlines()) == 13
    stored = rescore(read_transcript(path), task)
    assert {row.id: row for row in stored.rows} == {row.id: row for row in whole.rows}
    assert stored.total == whole.total
    with pytest.raises(TaskError, match=r"another evaluation.*task"):
        evaluate(loaded, get_task("wordmath-hard"), limit=1, answers=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no whole line"), ("{}\n", "expected format 'moebound.answers', found None"),
     ("nonsense\n", ":1: not JSON"), ("[]\n", ":1: expected a JSON object"),
     ('{"format": "moebound.answers", "version": 2}\n', "version 2"),
     ('{"format": "moebound.answers", "version": 1}\n', "not a header"),
     ('{"format": "moebound.answers", "version": 1, "source": {}, "task": "t", "settings": {}}\n'
      '{"id": "a"}\n', ":2: not an answer")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        read_transcript(path)
    with pytest.raises(TaskError, match="cannot be read"):
        read_transcript(tmp_path / "none")


def test_an_unfinished_answer_is_not_valid() -> None:
    from moebound.evaluate.evaluation import score

    task = get_task("wordmath")
    [problem] = task.problems(1)
    assert problem.reference is not None
    found = score(task, problem, Output(problem.reference, 64, finished=False))
    assert (found.pia, found.valid) == (True, False)
