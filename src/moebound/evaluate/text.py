"""Prompts with their solutions, tokenized, to be read at once (teacher forcing)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moebound.errors import TaskError
from moebound.evaluate.loading import Loaded
from moebound.evaluate.prompting import encode_prompts, encode_references
from moebound.model.pretrained import named
from moebound.tasks.base import Problem, Task
from moebound.text.encoding import check_tokens

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of (prompt, solution), the end mark included."""


@dataclass(frozen=True)
class Batch:
    """Sequences of prompt + solution + end, padded on the right. B sequences, T tokens.

    input_ids, attention_mask: [B, T]. Position t of a row predicts token t + 1. Masks of positions,
    [B, T - 1] or, where the last token is not read, [B, T]: `predicts` are those whose next token
    is there (not padding), `answers` those of them whose next token belongs to the solution or is
    its end. targets: next tokens, in the masks' shape; None where they are not known.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicts: torch.Tensor
    answers: torch.Tensor
    targets: torch.Tensor | None = None


def pad(rows: Rows, pad_token: int) -> Batch:
    """One batch of all rows."""
    lengths = [len(prompt) + len(solution) for prompt, solution in rows]
    input_ids = torch.full((len(rows), max(lengths)), pad_token)
    attention_mask = torch.zeros_like(input_ids)
    answers = torch.zeros((len(rows), max(lengths) - 1), dtype=torch.bool)
    for index, ((prompt, solution), length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[index, :length] = torch.tensor([*prompt, *solution])
        attention_mask[index, :length] = 1
        answers[index, len(prompt) - 1 : length - 1] = True
    predicts = attention_mask[:, 1:].bool()
    return Batch(input_ids, attention_mask, predicts, answers, input_ids[:, 1:])


def solved_rows(tokenizer: Any, task: Task, problems: Sequence[Problem]) -> Rows:
    """Prompts and reference solutions. Raises TaskError where a problem has none."""
    prompts = encode_prompts(tokenizer, task, problems)
    return list(zip(prompts, encode_references(tokenizer, task, problems), strict=True))


def answered_rows(
    tokenizer: Any, task: Task, problems: Sequence[Problem], texts: Sequence[str]
) -> Rows:
    """Prompts and a model's own answers, for tasks without references."""
    if len(texts) != len(problems):
        raise TaskError(f"{len(problems)} problems, but {len(texts)} answers")
    answered = [
        Problem(p.id, p.prompt, p.answer, text or None, p.format)
        for p, text in zip(problems, texts, strict=True)
    ]
    return solved_rows(tokenizer, task, answered)


def encode_file(loaded: Loaded, path: Path, limit: int | None = None) -> list[int]:
    """The first `limit` tokens of a UTF-8 file. Raises TaskError for a file that cannot be read as
    text, CheckpointError for one that the tokenizer or the model cannot take."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read as text: {error}") from error
    with named(f"{path}: the tokenizer cannot encode it"):
        ids = list(loaded.tokenizer(text, verbose=False)["input_ids"])[:limit]
    check_tokens(ids, loaded.model, str(path))
    return ids


def batches(rows: Rows, tokens: int) -> Iterator[list[int]]:
    """Indices of rows, those of like length together, in batches of at most so many tokens,
    padding counted; one row at least."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    taken: list[int] = []
    for index in order:
        length = len(rows[index][0]) + len(rows[index][1])
        if taken and length * (len(taken) + 1) > tokens:
            yield taken
            taken = []
        taken.append(index)
    if taken:
        yield taken
