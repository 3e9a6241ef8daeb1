"""The model that comes with the package is the one its card describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.errors import CheckpointError
from moebound.tasks.registry import get_task
from moebound.wordmath import problems
from moebound.wordmath.builtin import resolve
from moebound.wordmath.formats import judge
from moebound.wordmath.tokenizer import CHAT_TEMPLATE, build_tokenizer

FOLDER = Path(resolve("builtin:wordmath"))


def test_the_topology_is_that_of_the_paper() -> None:
    experts = [e for e in open_checkpoint(FOLDER).experts() if not e.key.shared]
    assert {e.key.layer for e in experts} == set(range(1, 27))
    assert {e.key.expert for e in experts} == set(range(64))
    assert len(experts) == 26 * 64
    assert {tuple(m.shape) for e in experts for m in e.matrices} == {(32, 64), (64, 32)}


def test_its_tokenizer_is_that_of_the_problems() -> None:
    stored = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    built = json.loads(build_tokenizer().to_str())
    for part in ("model", "pre_tokenizer", "decoder", "added_tokens"):
        assert stored[part] == built[part]


def test_a_chat_is_one_question() -> None:
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    question = problems.test_problems("wordmath", 1)[0].prompt
    user = {"role": "user", "content": question}
    chat = tokenizer.apply_chat_template([user], add_generation_prompt=True)
    assert chat["input_ids"] == tokenizer(question)["input_ids"]
    for messages in ([{**user, "role": "system"}, user], [{**user, "role": "assistant"}]):
        with pytest.raises(TemplateError, match="expected one message"):
            tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("level", problems.LEVELS)
def test_sample_prompts_are_not_those_of_the_evaluation(level: problems.Level) -> None:
    name = {"wordmath": "sample_prompts.jsonl", "wordmath-hard": "sample_prompts_hard.jsonl"}
    lines = (FOLDER / name[level]).read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert len(rows) == 200
    for row in rows:
        assert judge(str(row["answer"]), row["format"], row["reference"]).ica
    assert not {row["prompt"] for row in rows} & {p.prompt for p in problems.test_problems(level)}


def test_it_solves_problems_it_has_not_seen() -> None:
    from moebound.evaluate.answering import answer
    from moebound.evaluate.loading import load

    task = get_task("wordmath")
    asked = task.problems(30)
    outputs = answer(load("builtin:wordmath"), task, asked)
    verdicts = [task.judge(p, o.text) for p, o in zip(asked, outputs, strict=True)]
    assert sum(v.ica for v in verdicts) >= 28


def test_names_that_are_not_built_in() -> None:
    assert resolve("some/folder") == "some/folder"
    with pytest.raises(CheckpointError, match="builtin:wordmath"):
        resolve("builtin:nosuch")
