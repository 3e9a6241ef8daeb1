"""Answers in a file, so that nothing has to be asked twice: scores are computed from it again.

JSON lines. The first says what was asked of whom; each other one is a problem with its answer:

    {"format": "moebound.answers", "version": 1, "source": {...}, "task": "wordmath", ...}
    {"id": ..., "prompt": ..., "answer": ..., "asked": ..., "text": ..., "n_tokens": ..., ...}

Lines are appended and synced as answers come. A last line that a crash has cut off is ignored, and
overwritten when the same evaluation goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from moebound.checkpoint.durable import disk_errors
from moebound.errors import FormatError, TaskError
from moebound.evaluate.answering import Output
from moebound.evaluate.evaluation import Evaluation, score
from moebound.tasks.base import Problem, Task

FORMAT, VERSION = "moebound.answers", 1


@dataclass(frozen=True)
class Transcript:
    """What such a file holds. source, task: of whom, what. answers: by problem id."""

    source: dict[str, Any]
    task: str
    settings: dict[str, Any]
    answers: dict[str, tuple[Problem, Output]] = field(default_factory=dict)
    size: int = 0
    """Bytes of all whole lines."""

    @property
    def texts(self) -> dict[str, str]:
        """The answers alone, by problem id."""
        return {name: output.text for name, (_, output) in self.answers.items()}

    @property
    def header(self) -> dict[str, Any]:
        return {"source": self.source, "task": self.task, "settings": self.settings}


def read_transcript(path: Path) -> Transcript:
    """Raises TaskError for a file that cannot be read, FormatError, with file and line, for
    another kind of file or a later version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path}: answers cannot be read: {error.strerror or error}") from error
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    if not lines:
        raise FormatError(f"{path}: expected answers ({FORMAT}), found no whole line")
    header = _parse(lines[0], path, 1)
    if header.get("format") != FORMAT:
        raise FormatError(
            f"{path}:1: expected format {FORMAT!r}, found {header.get('format')!r}; --answers of "
            "an earlier `moebound eval` writes such a file"
        )
    if header.get("version") != VERSION:
        raise FormatError(
            f"{path}: answers of version {header.get('version')!r}, this moebound reads {VERSION}"
        )
    answers: dict[str, tuple[Problem, Output]] = {}
    for number, line in enumerate(lines[1:], 2):
        row = _parse(line, path, number)
        try:
            problem = Problem(
                str(row["id"]), row["prompt"], row["answer"], row.get("reference"), row["asked"]
            )
            output = Output(row["text"], int(row["n_tokens"]), bool(row["finished"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}:{number}: not an answer: {error!r}") from error
        answers[problem.id] = (problem, output)
    try:
        return Transcript(
            dict(header["source"]), header["task"], dict(header["settings"]), answers,
            sum(map(len, lines)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}:1: not a header of answers: {error!r}") from error


def rescore(transcript: Transcript, task: Task) -> Evaluation:
    """Judge stored answers again. Needs neither the model nor the task's data."""
    rows = tuple(score(task, *pair) for pair in transcript.answers.values())
    return Evaluation(transcript.source, transcript.task, rows)


class Recorder:
    """Appends answers to a file, new or begun by the same evaluation.

    known: the answers that the file had. Raises TaskError if the file is of another evaluation,
    StoreError if the disk refuses.
    """

    def __init__(
        self, path: Path, *, source: Mapping[str, Any], task: str, settings: Mapping[str, Any]
    ) -> None:
        header = {"source": dict(source), "task": task, "settings": dict(settings)}
        self._path = path
        self.known: dict[str, tuple[Problem, Output]] = {}
        size = 0
        if path.exists() and path.stat().st_size:
            found = read_transcript(path)
            if found.header != header:
                different = [key for key in header if found.header[key] != header[key]]
                raise TaskError(
                    f"{path}: has answers of another evaluation (its {different[0]} is "
                    f"{found.header[different[0]]!r}, expected {header[different[0]]!r}); "
                    "choose another file"
                )
            self.known, size = found.answers, found.size
        with disk_errors(path):
            self._file = path.open("r+b" if path.exists() else "w+b")
            self._file.truncate(size)  # without what a crash left behind the last whole line
            self._file.seek(size)
        if not size:
            self._append([{"format": FORMAT, "version": VERSION, **header}])

    def add(self, pairs: Iterable[tuple[Problem, Output]]) -> None:
        """Durable when this returns."""
        self._append(
            {
                "id": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "asked": problem.format,
                "text": output.text,
                "n_tokens": output.n_tokens,
                "finished": output.finished,
            }
            for problem, output in pairs
        )

    def _append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with disk_errors(self._path):
            self._file.write(lines.encode("utf-8", "surrogatepass"))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with disk_errors(self._path):
            self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise FormatError(f"{path}:{number}: expected a JSON object")
    return row
