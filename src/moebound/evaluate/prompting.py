"""Problems to token ids: through the chat template where both task and tokenizer want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moebound.errors import TaskError
from moebound.tasks.base import Problem, Task


def encode_prompts(tokenizer: Any, task: Task, problems: Sequence[Problem]) -> list[list[int]]:
    """The token ids that the model reads before it answers, a list a problem.

    A chat template brings its own special tokens and default system message; without one the
    tokenizer adds what it adds to any text. Raises TaskError for a prompt without any token.
    """
    if not problems:  # which tokenizers trip over
        return []
    if task.chat and getattr(tokenizer, "chat_template", None):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": problem.prompt}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for problem in problems
        ]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        encoded = tokenizer([task.plain_prompt(problem) for problem in problems])["input_ids"]
    for problem, ids in zip(problems, encoded, strict=True):
        if not ids:
            raise TaskError(f"task {task.name!r}, problem {problem.id!r}: its prompt has no tokens")
    return [list(ids) for ids in encoded]


def encode_references(tokenizer: Any, task: Task, problems: Sequence[Problem]) -> list[list[int]]:
    """The token ids of the reference solutions, each closed by the end mark if there is one.

    Raises TaskError for a problem without a reference.
    """
    for problem in problems:
        if not problem.reference:
            raise TaskError(
                f"task {task.name!r}, problem {problem.id!r}: no reference solution to read"
            )
    if not problems:
        return []
    references = [problem.reference for problem in problems]
    encoded = tokenizer(references, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [[*ids, end] if end is not None else list(ids) for ids in encoded]
