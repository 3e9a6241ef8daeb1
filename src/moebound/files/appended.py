"""Files of lines that are never lost: JSON, one object a line, appended and synced.

A run killed while it writes leaves a torn last line, which is not counted, and gone with the next
line that is appended. A disk that is full leaves every line that was there before. Two runs never
write to one file. What the lines say, and whether they are of this run, is their owner's business;
until it appends, the file is as it was.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moebound.errors import FormatError, MoeboundError, StoreError
from moebound.files.documents import parse_json
from moebound.files.durable import disk_errors


def whole_lines(data: bytes) -> list[bytes]:
    """The lines that are whole, without their ends; a torn last one is left out."""
    return data.split(b"\n")[:-1]


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """A line's object. where: of the message. Raises FormatError for anything else."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise FormatError(f"{where}: expected a JSON object, found {line[:40]!r}")
    return row


class Appended:
    """Such a file, made if it is not there. Open it in a `with`, or close it.

    lines: the whole lines that it had when it was opened. is_empty: it had not a byte.

    Raises MoeboundError if another run has it open, StoreError if the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            with disk_errors(path, "cannot be read"):
                data = path.read_bytes()
        except BaseException:
            self.close()
            raise
        self.lines = whole_lines(data)
        self.is_empty = not data
        self._n_lines = len(self.lines)
        self._size = sum(len(line) + 1 for line in self.lines)

    def append(self, rows: Iterable[Mapping[str, Any]], *, ensure_ascii: bool = True) -> None:
        """More lines; on disk when this returns. Raises StoreError if the disk refuses; the whole
        lines that were there are then all that is. Raises ValueError for NaN and infinity."""
        texts = [json.dumps(row, ensure_ascii=ensure_ascii, allow_nan=False) for row in rows]
        data = "".join(text + "\n" for text in texts).encode("utf-8", "surrogatepass")
        try:
            os.ftruncate(self._fd, self._size)  # without what a crash left behind the last line
            self._write(data)
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise StoreError(
                f"{self.path}: cannot be written: {error.strerror or error}; the "
                f"{self._n_lines} lines in it are kept, and the same command goes on from there"
            ) from error
        self._size += len(data)
        self._n_lines += len(texts)

    def _write(self, data: bytes) -> None:
        done = 0
        while done < len(data):  # a disk that fills takes a part first
            done += os.pwrite(self._fd, data[done:], self._size + done)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MoeboundError(f"{self.path}: another run is writing to it") from None
        except OSError:
            pass  # a network file system without locks

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
