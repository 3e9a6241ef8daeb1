"""Lines that are never lost: one JSON object each, appended and synced.

A run killed while it writes leaves a torn last line; the next run cuts it off. A disk that is full
leaves every line that was there before. Two runs never write to one file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moebound.checkpoint.durable import disk_errors
from moebound.errors import FormatError, MoeboundError, StoreError

KEY = "condition"


class Rows:
    """A file of rows, each with its condition's id. Open it in a `with`.

    found: by condition, those that were there, and those appended since. Of a condition that comes
    twice the first counts.

    Raises MoeboundError if another run has the file open, FormatError (with file and line) for a
    damaged line before the last, StoreError if the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        with disk_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            self._size = self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """One more; on disk when this returns. Raises StoreError, with what is kept, if the disk
        refuses; the file then is as it was."""
        data = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._write(data)
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise StoreError(
                f"{self.path}: cannot be written: {error.strerror or error}; the "
                f"{len(self.found)} finished rows in it are kept, and the same command goes on "
                "from there"
            ) from error
        self._size += len(data)
        self.found.setdefault(str(row[KEY]), dict(row))

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

    def _read(self) -> int:
        """Fill `found`, cut off a torn line; returns the bytes that are left."""
        with disk_errors(self.path, "cannot be read"):
            data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = str(row[KEY])
            except (ValueError, RecursionError, KeyError, TypeError) as error:
                raise FormatError(
                    f"{self.path}: line {number}: expected a JSON object with {KEY!r}: {error}"
                ) from error
            self.found.setdefault(key, row)
        if whole < len(data):
            with disk_errors(self.path):
                os.ftruncate(self._fd, whole)
        return whole

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
