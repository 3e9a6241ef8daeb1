"""Greedy answers are those of transformers' own loop, whatever the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moebound.errors import CheckpointError, MoeboundError, TaskError
from moebound.evaluate.answering import Output, answer, end_marks
from moebound.evaluate.decoding import Decoded, decode
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.prompting import encode_prompts, encode_references
from moebound.tasks import Problem, Task, Verdict, get_task
from tiny_models import tiny_model

# Plain attention, sliding windows, convolutions, linear attention, and a cache of its own.
FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "lfm2_moe", "qwen3_next", "minimax"]


def reference(model: Any, prompt: list[int], n: int, end: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                         do_sample=False, pad_token_id=0, eos_token_id=end)  # fmt: skip
    tokens = out[0, len(prompt) :].tolist()
    return tuple(tokens[: tokens.index(end)] if end in tokens else tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_as_transformers_generates(name: str) -> None:
    model: Any = tiny_model(name, dtype=torch.float32, seed=3)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (5, 9, 1, 9)]
    ends: list[tuple[int, ...]] = [reference(model, prompt, 8, end=-1) for prompt in prompts]
    end = ends[0][3]  # so that one row ends early, and the others go on without it
    expected = [reference(model, prompt, 8, end=end) for prompt in prompts]
    found = decode(model, prompts, max_new_tokens=8, ends=frozenset({end}), pad=0)
    assert [one.tokens for one in found] == expected
    assert [one.finished for one in found] == [len(one) < 8 for one in expected]


def test_limits_and_what_is_no_number() -> None:
    model: Any = tiny_model("qwen3_moe", dtype=torch.float32)
    prompts = [[5, 6, 7], [8]]
    whole = decode(model, prompts, max_new_tokens=6, ends=frozenset(), pad=0)
    short = decode(model, prompts, max_new_tokens=6, ends=frozenset(), pad=0, positions=5)
    assert [len(one.tokens) for one in short] == [2, 4]
    assert [one.tokens for one in short] == [whole[0].tokens[:2], whole[1].tokens[:4]]
    assert not any(one.finished for one in short)
    stopped = decode(model, prompts, max_new_tokens=6, ends=frozenset(), pad=0,
                     stopped=lambda tokens: len(tokens) == 2)  # fmt: skip
    assert [one.finished for one in stopped] == [True, True]
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    broken = decode(model, prompts, max_new_tokens=6, ends=frozenset(), pad=0)
    assert broken == [Decoded((), False)] * 2


def test_an_answer_does_not_depend_on_the_batch(loaded: Loaded) -> None:
    task = get_task("wordmath")
    problems = task.problems(24)
    seen: list[tuple[int, int]] = []
    together = answer(loaded, task, problems, progress=lambda n, of: seen.append((n, of)))
    assert seen == [(24, 24)]
    assert answer(loaded, task, problems, batch=7) == together
    assert answer(loaded, task, problems[::-1])[::-1] == together
    assert answer(loaded, task, problems[4:5], batch=1) == together[4:5]
    assert answer(loaded, task, []) == []


def test_another_experts_implementation_answers_the_same() -> None:
    task = get_task("wordmath")
    problems = task.problems(6)
    own, ours = (load("builtin:wordmath", experts=name) for name in ("eager", "auto"))
    assert (own.source.experts, ours.source.experts) == ("eager", "moebound-batched")
    assert own.source.weights == ours.source.weights
    assert answer(own, task, problems) == answer(ours, task, problems)


class Stopping(Task):
    name, max_new_tokens, chat = "stopping", 20, True

    def __init__(self, *stop: str) -> None:
        self.stop = stop

    def problems(self, limit: int | None = None) -> list[Problem]:
        return get_task("wordmath").problems(limit)

    def judge(self, problem: Problem, text: str) -> Verdict:
        return Verdict(False, False, False, None)


def test_stop_texts_end_an_answer_and_are_not_in_it(loaded: Loaded) -> None:
    problems = Stopping().problems(4)
    whole = answer(loaded, Stopping(), problems)
    for before, after in zip(whole, answer(loaded, Stopping("="), problems), strict=True):
        if "=" in before.text:
            assert after.text == before.text.split("=")[0].strip()
            assert after.finished
            assert after.n_tokens <= before.n_tokens
        else:
            assert after == before


class Chatting:
    """A tokenizer with a chat template, around one that has none."""

    chat_template = "yes"

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        [message] = messages
        return f"{message['content']} 7 ="

    def __call__(self, texts: Any, **options: Any) -> Any:
        return self._inner(texts, **options)


def test_prompts_go_through_the_chat_template_once(loaded: Loaded) -> None:
    task = Stopping()
    problems = task.problems(3)
    found = encode_prompts(Chatting(loaded.tokenizer), task, problems)
    texts = [f"{problem.prompt} 7 =" for problem in problems]
    assert found == loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
    plain = encode_prompts(loaded.tokenizer, task, problems)
    assert plain == loaded.tokenizer([problem.prompt for problem in problems])["input_ids"]
    solutions = encode_references(loaded.tokenizer, task, problems)
    assert all(ids[-1] in end_marks(loaded) for ids in solutions)
    with pytest.raises(TaskError, match="no reference"):
        encode_references(loaded.tokenizer, task, [Problem("x", "p", "1")])


def test_what_cannot_be_loaded_or_asked(loaded: Loaded, tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="no such built-in model"):
        load("builtin:none")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(tmp_path)
    with pytest.raises(MoeboundError, match="float8"):
        load("builtin:wordmath", dtype="float8")
    with pytest.raises(MoeboundError, match="nosuch"):
        load("builtin:wordmath", experts="nosuch")
    task = Stopping()
    long = Problem("long", "2 " * 400, "1")
    with pytest.raises(TaskError, match=r"'long'.*no room"):
        answer(loaded, task, [long])
    with pytest.raises(TaskError, match="batch 0"):
        answer(loaded, task, task.problems(1), batch=0)
    assert answer(loaded, task, [Problem("short", "2 + 2 =", "4")])[0].__class__ is Output
