"""Problems to token ids: through the chat template where both task and tokenizer want it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moebound.errors import TaskError
from moebound.tasks.base import Problem, Task
from moebound.text.encoding import chat_text, check_tokens, encode_all


def encode_prompts(
    tokenizer: Any, task: Task, problems: Sequence[Problem], *, model: Any = None
) -> list[list[int]]:
    """The token ids that the model reads before it answers, a list a problem.

    A chat template brings its own special tokens and default system message; without one the
    tokenizer adds what it adds to any text. model: what is to read them. Raises TaskError for a
    prompt without any token, and CheckpointError for one that tokenizer, template or model refuse.
    """
    if task.chat and getattr(tokenizer, "chat_template", None):
        texts = [
            chat_text(tokenizer, [{"role": "user", "content": problem.prompt}])
            for problem in problems
        ]
        encoded = encode_all(tokenizer, texts, special=False)
    else:
        encoded = encode_all(tokenizer, [task.plain_prompt(problem) for problem in problems])
    for problem, ids in zip(problems, encoded, strict=True):
        if not ids:
            raise TaskError(f"task {task.name!r}, problem {problem.id!r}: its prompt has no tokens")
        if model is not None:
            check_tokens(ids, model, f"task {task.name!r}, problem {problem.id!r}: its prompt")
    return encoded


def encode_references(
    tokenizer: Any, task: Task, problems: Sequence[Problem], *, model: Any = None
) -> list[list[int]]:
    """The token ids of the reference solutions, each closed by the end mark if there is one.

    Raises TaskError for a problem without a reference.
    """
    for problem in problems:
        if not problem.reference:
            raise TaskError(
                f"task {task.name!r}, problem {problem.id!r}: no reference solution to read"
            )
    encoded = encode_all(
        tokenizer, [problem.reference or "" for problem in problems], special=False
    )
    if model is not None:
        for problem, ids in zip(problems, encoded, strict=True):
            check_tokens(ids, model, f"task {task.name!r}, problem {problem.id!r}: its reference")
    end = tokenizer.eos_token_id
    return [[*ids, end] if end is not None else ids for ids in encoded]
