"""The text to calibrate on: the prompts of a task with their solutions, or windows of a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebound.errors import MoeboundError, TaskError
from moebound.evaluate.loading import Loaded
from moebound.evaluate.text import Rows, encode_file, solved_rows
from moebound.tasks.base import Task
from moebound.text.generation import n_positions

WINDOW = 512
"""Tokens of one window of a file, unless the model has fewer positions or another is asked."""


@dataclass(frozen=True)
class Text:
    """name: of the task or file. rows: token ids of each sequence, read on its own."""

    name: str
    rows: tuple[tuple[int, ...], ...]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def sha256(self) -> str:
        """Of the token ids, sequence by sequence."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(np.array(row, "<i8").tobytes())
        return digest.hexdigest()


def of_task(loaded: Loaded, task: Task, limit: int | None = None, *, skip: int = 0) -> Text:
    """`limit` problems of a task behind the first `skip`, each prompt with its solution.

    Raises TaskError where a problem has no solution, MoeboundError where no problem is left.
    """
    return whole(task, solved(loaded, task, limit, skip=skip))


def solved(loaded: Loaded, task: Task, limit: int | None = None, *, skip: int = 0) -> Rows:
    """As `of_task`: prompts and solutions, apart."""
    problems = task.problems(None if limit is None else skip + limit)[skip:]
    if not problems:
        raise MoeboundError(f"task {task.name!r}: no problems behind the first {skip}")
    return solved_rows(loaded.tokenizer, task, problems)


def whole(task: Task, rows: Rows) -> Text:
    """Prompts and solutions, one behind the other."""
    return Text(task.name, tuple((*prompt, *solution) for prompt, solution in rows))


def of_file(
    loaded: Loaded, path: Path, limit: int | None = None, *, window: int | None = None
) -> Text:
    """The first `limit` windows of a UTF-8 file, one behind the other; what is left at the end and
    fills no window is not read.

    window: tokens of each. Raises TaskError for a file that cannot be read as text or fills none.
    """
    positions = n_positions(loaded.model)
    size = min(WINDOW, positions or WINDOW) if window is None else window
    if positions is not None and size > positions:
        raise MoeboundError(f"--window {size}: the model has positions for {positions} tokens")
    ids = encode_file(loaded, path)
    n = len(ids) // size
    if n == 0:
        raise TaskError(
            f"{path}: {len(ids)} tokens, and a window is {size}; expected one window at least: "
            f"give a longer text, or shorter windows (--window {max(len(ids), 1)})"
        )
    n = n if limit is None else min(n, limit)
    rows = tuple(tuple(ids[at * size : (at + 1) * size]) for at in range(n))
    return Text(path.name, rows)
