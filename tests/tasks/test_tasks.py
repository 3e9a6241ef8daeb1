"""What a user can type behind --task, and what answers are worth."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moebound.errors import MoeboundError, TaskError
from moebound.tasks import Problem, Task, get_task
from moebound.tasks.gsm8k import Gsm8k
from moebound.tasks.math import Math
from moebound.tasks.rows import DATA_VARIABLE, find_data

DATA = os.environ.get(DATA_VARIABLE)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def worth(task: Task, problem: Problem, text: str) -> str:
    verdict = task.judge(problem, text)
    assert verdict.pia or not verdict.ica
    assert verdict.valid == (verdict.extracted is not None)
    return ("ICA" if verdict.ica else "PIA" if verdict.pia else
            "wrong" if verdict.valid else "nothing")  # fmt: skip


@pytest.mark.parametrize("name", ["wordmath", "wordmath-hard"])
def test_word_problems_are_stable_and_their_references_right(name: str) -> None:
    task = get_task(name)
    problems = task.problems(40)
    assert problems == get_task(name).problems(80)[:40]
    assert len({problem.id for problem in problems}) == 40
    for problem in problems:
        assert problem.reference is not None
        assert worth(task, problem, problem.reference) == "ICA"
        assert worth(task, problem, problem.answer) == "PIA"
        assert worth(task, problem, "") == "nothing"


def test_unknown_tasks_are_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"wordmath, wordmath-hard, gsm8k, math, lm-eval:NAME"):
        get_task("wordmaths")
    with pytest.raises(TaskError, match="lm-eval"):
        get_task("lm-eval:hellaswag")
    with pytest.raises(TaskError, match="only gsm8k and math"):
        get_task("wordmath", data=tmp_path)
    assert issubclass(TaskError, MoeboundError)


GSM = {"question": "How much?", "answer": "6 * 3 = $<<6*3=18>>18\n#### 1,018"}


def test_gsm8k(tmp_path: Path) -> None:
    task = get_task("gsm8k", data=write(tmp_path / "g.jsonl", GSM, GSM))
    assert len(task.problems(1)) == 1
    problem = task.problems()[1]
    assert problem.answer == "1018"
    assert "\\boxed{}" in problem.prompt
    assert problem.reference == "6 * 3 = $18\nThe final answer is \\boxed{1018}."
    for text, expected in [
        (r"so \boxed{1018}", "ICA"),
        (r"\boxed{\$1,018.00}", "ICA"),
        (r"\boxed{1{,}018}", "ICA"),
        (r"\boxed{1018 \text{ dollars}}", "ICA"),
        (r"\boxed{17} no, \boxed{1018}", "ICA"),
        (r"\boxed{1018} no, \boxed{17}. 1018", "wrong"),
        ("The answer is 1018 dollars. I used 3 steps", "PIA"),
        ("#### 1018", "PIA"),
        (r"that makes 1,018 \boxed{", "PIA"),
        (r"\boxed{the sum above} is 1018", "PIA"),
        ("1018 was it, or 17", "wrong"),
        ("I do not know", "nothing"),
    ]:
        assert worth(task, problem, text) == expected, text


def test_parquet_has_the_same_problems(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install '.[parquet]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([GSM, GSM]), tmp_path / "g.parquet")
    lines = Gsm8k(write(tmp_path / "g.jsonl", GSM, GSM))
    assert Gsm8k(tmp_path / "g.parquet").problems() == lines.problems()
    (tmp_path / "g.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskError, match=r"g\.parquet: cannot be read as parquet"):
        Gsm8k(tmp_path / "g.parquet").problems()


def test_math(tmp_path: Path) -> None:
    row = {"problem": "x?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}
    folder = tmp_path / "test" / "algebra"
    folder.mkdir(parents=True)
    (folder / "7.json").write_text(json.dumps(row), encoding="utf-8")
    task = get_task("math", data=tmp_path / "test")
    [problem] = task.problems()
    assert problem.answer == r"\frac{1}{2}"
    for text, expected in [
        (r"\boxed{\frac12}", "ICA"),
        (r"\boxed{0.5}", "ICA"),
        (r"\boxed{x=\frac{1}{2}}", "ICA"),
        (r"\boxed{2}", "wrong"),
        (r"we find $\frac{1}{2}$", "PIA"),
        ("we find 3", "wrong"),
        ("no idea", "nothing"),
    ]:
        assert worth(task, problem, text) == expected, text
    with_answer = write(tmp_path / "m.jsonl", {"problem": "x?", "answer": "5", "solution": "?"})
    assert Math(with_answer).problems()[0].answer == "5"


def test_data_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm8k").mkdir()
    path = write(tmp_path / "gsm8k" / "test.jsonl", GSM)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert find_data("gsm8k", None, hub=("a/b", "c")) == path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"MOEBOUND_DATA/math/test\.jsonl.*--data"):
        find_data("math", None, hub=("nobody/nothing", "c.jsonl"))
    with pytest.raises(TaskError, match="no such file"):
        find_data("math", tmp_path / "none", hub=("a/b", "c"))


@pytest.mark.parametrize(
    ("row", "message"),
    [({"question": "q"}, r"g\.jsonl:2: no field 'answer'; found question"),
     ({"question": "", "answer": "#### 1"}, r"g\.jsonl:2:question: expected a text, found an"),
     ({"question": 5, "answer": "#### 1"}, r"g\.jsonl:2:question: expected a text, found int"),
     ({"question": "q", "answer": "none"}, r"g\.jsonl:2:answer: expected to end in ####"),
     ([1], r"g\.jsonl:2: expected a JSON object, found list")],
)  # fmt: skip
def test_wrong_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Gsm8k(write(tmp_path / "g.jsonl", GSM, row)).problems()


@pytest.mark.skipif(not DATA, reason=f"{DATA_VARIABLE} names no folder with gsm8k/test.jsonl")
def test_all_of_gsm8k_judges_its_own_solutions() -> None:
    task = get_task("gsm8k")
    problems = task.problems()
    assert len(problems) == 1319
    for problem in problems:
        assert problem.reference is not None
        assert worth(task, problem, problem.reference) == "ICA"
        assert worth(task, problem, f"Hence {problem.answer}") == "PIA"


def test_a_users_file(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "2+3?", "answer": 5, "format": "boxed", "id": "sum"},
        {"prompt": "Which day?", "answer": "Monday"},
        {"prompt": "Only the word.", "answer": "Yes", "format": "exact"},
    )
    task = get_task(str(path))
    boxed, free, exact = task.problems()
    assert (boxed.id, free.id, boxed.answer) == ("sum", "line 2", "5")
    assert [p.id for p in task.problems(1)] == ["sum"]
    for problem, text, expected in [
        (boxed, r"\boxed{5.0}", "ICA"), (boxed, "it is 5", "PIA"), (boxed, r"\boxed{6} 5", "wrong"),
        (boxed, '{"answer": 5}', "PIA"), (boxed, "", "nothing"),
        (free, "The answer is monday.", "ICA"), (free, "Hm.\nMonday", "ICA"),
        (free, "Sunday", "wrong"),
        (exact, " yes ", "ICA"), (exact, "The answer is yes.", "PIA"), (exact, "no", "wrong"),
    ]:  # fmt: skip
        assert worth(task, problem, text) == expected, text


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"prompt": "a", "answer": "b"', r"p\.jsonl:1: not JSON"),
     ('{"prompt": "a"}', r"p\.jsonl:1: no field 'answer'"),
     ('{"answer": 1}', r"p\.jsonl:1: no field 'prompt'"),
     ('{"prompt": "a", "answer": true}', r"p\.jsonl:1:answer: expected a text, found bool"),
     ('{"prompt": "a", "answer": NaN}', r"p\.jsonl:1:answer: expected a finite number"),
     ('{"prompt": "a", "answer": 1, "format": "xml"}', r"p\.jsonl:1:format: expected one of boxed"),
     ('{"prompt": "a", "answer": 1, "format": ["boxed"]}', r"p\.jsonl:1:format: expected one of"),
     ('{"prompt": "a", "answer": 1, "anwser": 2}', r"p\.jsonl:1:anwser: unknown field"),
     ('{"prompt": "a", "answer": 1, "id": "x"}\n{"prompt": "a", "answer": 1, "id": "x"}',
      r"p\.jsonl:2:id: 'x' is the id of .*p\.jsonl:1 too"),
     (r'{"prompt": "a\ud800", "answer": 1}', r"p\.jsonl:1:prompt: half of a surrogate pair"),
     ('{"prompt": "a", "answer": 1' + "0" * 5000 + "}", r"p\.jsonl:1: not JSON"),
     ("\n \n", r"p\.jsonl: no problems"),
     ("[" * 100_000, r"p\.jsonl:1: not JSON")],
)  # fmt: skip
def test_a_users_mistakes_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        get_task(str(path)).problems()


def test_an_answer_longer_than_a_float(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": 1' + "0" * 400 + "}", encoding="utf-8")
    [problem] = get_task(str(path)).problems()
    assert problem.answer == "1" + "0" * 400


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(TaskError, match="not UTF-8"):
        get_task(str(path)).problems()
