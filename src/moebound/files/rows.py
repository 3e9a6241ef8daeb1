"""Rows by key: a line for each finished piece of work, kept as in `appended.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moebound.errors import FormatError
from moebound.files.appended import Appended, parse_line
from moebound.files.documents import read_bytes

KEY = "condition"
"""The field that says of what a row is: the first were those of a study."""


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, with its place for messages. The file may be written to meanwhile.

    A torn last line is left out. Raises MoeboundError for a file that cannot be read, FormatError,
    with file and line, for damage before the last.
    """
    lines = read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            row = parse_line(line, where)
        except FormatError:
            if number < len(lines):
                raise
            return
        yield where, row


class Rows:
    """A file of rows, each with its KEY. Open it in a `with`.

    found: by key, those that were there, and those appended since. Of a key that comes twice the
    first counts.

    Raises MoeboundError if another run has the file open, FormatError (with file and line) for a
    damaged line before the last, StoreError if the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        self._file = Appended(path)
        try:
            for number, line in enumerate(self._file.lines, 1):
                where = f"{path}: line {number}"
                if line.strip():
                    self._found(parse_line(line, where), where)
        except BaseException:
            self.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """One more; on disk when this returns. Raises StoreError, with what is kept, if the disk
        refuses; the file then is as it was."""
        self._file.append([row])
        self._found(dict(row), str(self.path))

    def _found(self, row: dict[str, Any], where: str) -> None:
        if KEY not in row:
            raise FormatError(f"{where}: expected a JSON object with {KEY!r}")
        self.found.setdefault(str(row[KEY]), row)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
