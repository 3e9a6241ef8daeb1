"""The models that come with the package are those their cards describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moebound.checkpoint import open_checkpoint, top_k_of
from moebound.errors import CheckpointError
from moebound.tasks.registry import get_task
from moebound.wordmath import problems
from moebound.wordmath.builtin import MODELS, resolve
from moebound.wordmath.formats import judge
from moebound.wordmath.tokenizer import CHAT_TEMPLATE, build_tokenizer

FOLDER = Path(resolve("builtin:wordmath"))
SHARED = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    "sample_prompts.jsonl", "sample_prompts_hard.jsonl",
)  # fmt: skip


def test_their_names() -> None:
    assert MODELS == ("builtin:wordmath", "builtin:wordmath-mixtral")
    assert len({resolve(name) for name in MODELS}) == len(MODELS)


def test_the_topology_is_that_of_the_paper() -> None:
    experts = [e for e in open_checkpoint(FOLDER).experts() if not e.key.shared]
    assert {e.key.layer for e in experts} == set(range(1, 27))
    assert {e.key.expert for e in experts} == set(range(64))
    assert len(experts) == 26 * 64
    assert {tuple(m.shape) for e in experts for m in e.matrices} == {(32, 64), (64, 32)}


def test_the_second_has_few_wide_experts() -> None:
    checkpoint = open_checkpoint("builtin:wordmath-mixtral")
    experts = checkpoint.experts()
    assert checkpoint.config["model_type"] == "mixtral"
    assert top_k_of(checkpoint.config) == 2
    assert {e.key.layer for e in experts} == set(range(8))  # each layer of the model is a MoE layer
    assert {e.key.expert for e in experts} == set(range(8))
    assert len(experts) == 8 * 8
    assert {tuple(m.shape) for e in experts for m in e.matrices} == {(256, 256)}
    assert {str(m.dtype) for e in experts for m in e.matrices} == {"BF16"}


@pytest.mark.parametrize("name", SHARED)
def test_what_they_share_is_the_same(name: str) -> None:
    first, *others = (Path(resolve(model), name).read_bytes() for model in MODELS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("model", MODELS)
def test_a_card_says_how_many_weights_there_are(model: str) -> None:
    checkpoint = open_checkpoint(model)
    card = Path(resolve(model), "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"{checkpoint.total_bytes / 2 / 1e6:.2f} million parameters in bf16" in card
    share = 100 * checkpoint.expert_bytes / checkpoint.total_bytes
    assert f"{share:.0f} percent of them in routed experts" in card


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "n", "right"), [("builtin:wordmath", 30, 28), ("builtin:wordmath-mixtral", 60, 53)]
)
def test_they_solve_problems_they_have_not_seen(model: str, n: int, right: int) -> None:
    from moebound.evaluate.answering import answer
    from moebound.evaluate.loading import load

    task = get_task("wordmath")
    asked = task.problems(n)
    outputs = answer(load(model), task, asked)
    verdicts = [task.judge(p, o.text) for p, o in zip(asked, outputs, strict=True)]
    assert sum(v.ica for v in verdicts) >= right


def test_names_that_are_not_built_in() -> None:
    assert resolve("some/folder") == "some/folder"
    with pytest.raises(CheckpointError, match="builtin:wordmath"):
        resolve("builtin:nosuch")
