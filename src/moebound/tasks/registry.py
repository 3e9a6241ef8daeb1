"""From what a user types behind --task to a task."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from moebound.errors import TaskError
from moebound.tasks.base import Task
from moebound.tasks.wordmath import WordMath
from moebound.wordmath.problems import Level

LM_EVAL = "lm-eval:"
_LEVELS: tuple[Level, ...] = get_args(Level)
NAMES = (*_LEVELS, "gsm8k", "math")


def get_task(text: str, *, data: Path | None = None) -> Task:
    """The task of a name in NAMES, or of a file with problems (see jsonl.py).

    data: the file that gsm8k or math are read from, in place of where they are looked for.
    Raises TaskError for anything else.
    """
    if text == "gsm8k":
        from moebound.tasks.gsm8k import Gsm8k

        return Gsm8k(data)
    if text == "math":
        from moebound.tasks.math import Math

        return Math(data)
    if data is not None:
        raise TaskError(f"task {text!r}: only gsm8k and math are read from a file of data")
    for level in _LEVELS:
        if text == level:
            return WordMath(level)
    if text.startswith(LM_EVAL):
        raise TaskError(
            f"task {text!r}: tasks of lm-eval are asked and scored by lm-eval as a whole, with "
            "`moebound eval`; they have no problems to look at one by one"
        )
    path = Path(text)
    if path.is_file():
        from moebound.tasks.jsonl import JsonlTask

        return JsonlTask(path)
    known = ", ".join(NAMES)
    raise TaskError(
        f"task {text!r}: expected {known}, {LM_EVAL}NAME or a .jsonl file; there is no such file"
    )
