"""The text to calibrate on: the prompts of a task with their solutions, windows of a file, or what
a model made (`self_sampling.py`), which is kept as a document:

    tokens    token ids of each sequence
    texts     the same as text, for those who want to read it
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebound.errors import FormatError, MoeboundError, TaskError
from moebound.evaluate.loading import Loaded
from moebound.evaluate.text import Rows, encode_file, solved_rows
from moebound.files.documents import Format, count, fields_of, items, save_json
from moebound.tasks.base import Task
from moebound.text.encoding import check_tokens
from moebound.text.generation import n_positions

WINDOW = 512
"""Tokens of one window of a file, unless the model has fewer positions or another is asked."""
FORMAT = Format("moebound.text", 1)
_HEAD = b'{"format": "moebound.text"'
_MOST = 1 << 40


@dataclass(frozen=True)
class Text:
    """name: of the task or file. rows: token ids of each sequence, read on its own. prompts: how
    many tokens of each are asked and not answered; none where nobody knows."""

    name: str
    rows: tuple[tuple[int, ...], ...]
    prompts: tuple[int, ...] = ()

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


def save_text(text: Text, path: Path, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Keep token ids. about: fields that say where they are from."""
    texts = [tokenizer.decode(list(row)) for row in text.rows]
    document = FORMAT.header | {"name": text.name, **about, "sha256": text.sha256}
    save_json(path, document | {"tokens": [list(row) for row in text.rows], "texts": texts})


def read_text(path: Path) -> tuple[Text, Mapping[str, Any]]:
    """A text that was kept, and its document. Raises FormatError for a file that is none, or whose
    tokens are not those that it names."""
    content = FORMAT.read(path).content
    with fields_of(str(path)):
        rows = tuple(
            tuple(count(token, "token", most=_MOST) for token in items(row, "tokens"))
            for row in items(content["tokens"], "tokens")
        )
        text = Text(str(content["name"]), rows)
        if text.sha256 != content["sha256"]:
            raise FormatError(f"sha256 {content['sha256']!r}, and its tokens have {text.sha256!r}")
    return text, content


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
    prompts = tuple(len(prompt) for prompt, _ in rows)
    return Text(task.name, tuple((*prompt, *solution) for prompt, solution in rows), prompts)


def of_file(
    loaded: Loaded, path: Path, limit: int | None = None, *, window: int | None = None
) -> Text:
    """The first `limit` windows of a UTF-8 file, one behind the other; what is left at the end and
    fills no window is not read. Of a text that was kept (`save_text`), its sequences as they are.

    window: tokens of each. Raises TaskError for a file that cannot be read as text or fills none,
    FormatError and CheckpointError for a text that was kept and is damaged, or another model's,
    MoeboundError for one that is not whole yet.
    """
    if is_kept(path):
        if window is not None:
            raise MoeboundError(
                f"--window {window}: {path} has sequences of its own, which are not cut anew"
            )
        text, content = read_text(path)
        n, sampling = len(text.rows), content.get("sampling")
        in_all = sampling.get("n_sequences") if isinstance(sampling, Mapping) else None
        if isinstance(in_all, int) and n < in_all and (limit is None or limit > n):
            raise MoeboundError(
                f"{path}: {n} of {in_all} sequences, so its sampling was interrupted: call "
                f"`moebound calibrate --self-sample` again, which goes on, or take --limit {n}"
            )
        check_tokens((token for row in text.rows for token in row), loaded.model, str(path))
        return Text(text.name, text.rows[:limit])
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


def is_kept(path: Path) -> bool:
    """Whether a file looks like one of `save_text`."""
    try:
        with path.open("rb") as file:
            return file.read(len(_HEAD)) == _HEAD
    except OSError:
        return False  # who reads it says so
