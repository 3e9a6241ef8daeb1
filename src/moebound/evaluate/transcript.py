"""Answers in a file, so that nothing has to be asked twice: scores are computed from it again.

JSON lines. The first says what was asked of whom; each other one is a problem with its answer:

    {"format": "moebound.answers", "version": 1, "source": {...}, "task": "wordmath", ...}
    {"id": ..., "prompt": ..., "answer": ..., "asked": ..., "text": ..., "n_tokens": ..., ...}

Lines are kept as `files/appended.py` keeps them, as answers come: one that a crash has cut off
is ignored, and overwritten when the same evaluation goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from moebound.errors import FormatError, TaskError
from moebound.evaluate.answering import Output
from moebound.evaluate.evaluation import Evaluation, score
from moebound.files.appended import Appended, parse_line, whole_lines
from moebound.tasks.base import Problem, Task

FORMAT, VERSION = "moebound.answers", 1


@dataclass(frozen=True)
class Transcript:
    """What such a file holds. source, task: of whom, what. answers: by problem id."""

    source: dict[str, Any]
    task: str
    settings: dict[str, Any]
    answers: dict[str, tuple[Problem, Output]] = field(default_factory=dict)

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
    return _transcript(path, whole_lines(data))


def _transcript(path: Path, lines: Sequence[bytes]) -> Transcript:
    if not lines:
        raise FormatError(f"{path}: expected answers ({FORMAT}), found no whole line")
    header = parse_line(lines[0], f"{path}:1")
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
        row = parse_line(line, f"{path}:{number}")
        try:
            problem = Problem(
                str(row["id"]), row["prompt"], row["answer"], row.get("reference"), row["asked"]
            )
            output = Output(row["text"], int(row["n_tokens"]), bool(row["finished"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}:{number}: not an answer: {error!r}") from error
        answers[problem.id] = (problem, output)
    try:
        return Transcript(dict(header["source"]), header["task"], dict(header["settings"]), answers)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}:1: not a header of answers: {error!r}") from error


def rescore(transcript: Transcript, task: Task) -> Evaluation:
    """Judge stored answers again. Needs neither the model nor the task's data."""
    rows = tuple(score(task, *pair) for pair in transcript.answers.values())
    return Evaluation(transcript.source, transcript.task, rows)


class Recorder:
    """Appends answers to a file, new or begun by the same evaluation.

    known: the answers that the file had. Raises TaskError if the file is of another evaluation,
    MoeboundError if another run is writing to it, StoreError if the disk refuses.
    """

    def __init__(
        self, path: Path, *, source: Mapping[str, Any], task: str, settings: Mapping[str, Any]
    ) -> None:
        header = {"source": dict(source), "task": task, "settings": dict(settings)}
        self.known: dict[str, tuple[Problem, Output]] = {}
        self._file = Appended(path)
        try:
            if self._file.is_empty:
                self._append([{"format": FORMAT, "version": VERSION, **header}])
            else:
                self.known = _of_the_same(path, self._file.lines, header)
        except BaseException:
            self.close()
            raise

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
        self._file.append(rows, ensure_ascii=False)

    def close(self) -> None:
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


def _of_the_same(
    path: Path, lines: Sequence[bytes], header: Mapping[str, Any]
) -> dict[str, tuple[Problem, Output]]:
    """The answers in a file. Raises TaskError if they are of another evaluation."""
    found = _transcript(path, lines)
    if found.header != header:
        different = [key for key in header if found.header[key] != header[key]]
        raise TaskError(
            f"{path}: has answers of another evaluation (its {different[0]} is "
            f"{found.header[different[0]]!r}, expected {header[different[0]]!r}); "
            "choose another file"
        )
    return found.answers
