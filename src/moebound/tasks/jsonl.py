"""A user's own problems: a file with one JSON object a line.

    {"prompt": "What is 2 + 3? Answer in a box.", "answer": 5, "format": "boxed", "id": "sum-1"}

prompt and answer are required; answer is a text or a number. format: the answer format that the
prompt asks for: boxed, hashes, sentence, json, or exact (the answer and nothing else). Without one,
the right answer in any format is compliant. reference: a solution, for teacher forcing. id: any
text, different on each line; the line number where it is missing. Prompts are messages of a user
where the model has a chat template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moebound.errors import TaskError
from moebound.tasks import answers
from moebound.tasks.base import Problem, Task, Verdict
from moebound.tasks.rows import field, read_rows

_FIELDS = ("prompt", "answer", "format", "reference", "id")

_READERS: dict[str, Callable[[str], str | None]] = {
    "boxed": answers.last_boxed,
    "hashes": answers.after_hashes,
    "sentence": answers.in_sentence,
    "json": answers.in_json,
    "exact": lambda text: text.strip() or None,
}
FORMATS = tuple(_READERS)


class JsonlTask(Task):
    """The problems of one file. name: the path as given."""

    max_new_tokens = 512
    chat = True

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def problems(self, limit: int | None = None) -> list[Problem]:
        """Every line is checked, whatever the limit. Raises TaskError: file:line:field."""
        found: list[Problem] = []
        seen: dict[str, str] = {}
        for where, row in read_rows(self._path):
            problem = _problem(row, where)
            if problem.id in seen:
                raise TaskError(f"{where}:id: {problem.id!r} is the id of {seen[problem.id]} too")
            seen[problem.id] = where
            found.append(problem)
        if not found:
            raise TaskError(f"{self._path}: no problems in it")
        return found if limit is None else found[:limit]

    def judge(self, problem: Problem, text: str) -> Verdict:
        """ICA: the right answer, read in the format asked. PIA: that; or, where nothing is in
        that format, the right answer in another one, or the number or line the text ends with."""
        asked = problem.format
        found = _READERS[asked](text) if asked else None
        if found is not None and (asked != "exact" or _same(found, problem.answer)):
            right = _same(found, problem.answer)
            return Verdict(right, right, True, found)
        found = _anywhere(text, number=answers.as_number(problem.answer) is not None)
        right = found is not None and _same(found, problem.answer)
        return Verdict(right and not asked, right, found is not None, found)


def _anywhere(text: str, *, number: bool) -> str | None:
    """The answer that a text gives in no special format, or in one that was not asked for."""
    for name in ("boxed", "json", "hashes", "sentence"):
        found = _READERS[name](text)
        if found is not None:
            return found
    if number:
        return answers.last_number(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def _same(found: str, answer: str) -> bool:
    """Equal as numbers, or as texts but for case, spaces and a full stop."""
    return answers.same_number(found, answer) or _plain(found) == _plain(answer)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    unknown = [name for name in row if name not in _FIELDS]
    if unknown:
        raise TaskError(f"{where}:{unknown[0]}: unknown field; expected {', '.join(_FIELDS)}")
    return Problem(
        id=field(row, where, "id") if row.get("id") is not None else f"line {_line(where)}",
        prompt=field(row, where, "prompt"),
        answer=_answer(row, where),
        reference=None if row.get("reference") is None else field(row, where, "reference"),
        format=_format(row, where),
    )


def _answer(row: Mapping[str, Any], where: str) -> str:
    value = row.get("answer")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise TaskError(f"{where}:answer: expected a finite number, found {value}")
        return str(value)
    return field(row, where, "answer")


def _format(row: Mapping[str, Any], where: str) -> str:
    value = row.get("format")
    if value is None:
        return ""
    if value not in FORMATS:
        raise TaskError(f"{where}:format: expected one of {', '.join(FORMATS)}, found {value!r}")
    return str(value)


def _line(where: str) -> str:
    return where.rsplit(":", 1)[-1]
