"""What is finished of a map, in a file beside it: killed at any moment, the next run goes on.

Kept as `files/appended.py` keeps lines. The first says what the rows are of, and rows of
anything else are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moebound.errors import FormatError, MoeboundError
from moebound.files.appended import Appended, parse_line
from moebound.files.durable import disk_errors

SUFFIX = ".rows.partial"


class Rows:
    """The rows of one run. Use `open` ... `append` ... `remove`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """path: of the finished file, beside which the rows are.

        Raises MoeboundError if there are rows of another run or one is writing them, StoreError if
        the disk refuses.
        """
        self.path = path.with_name(path.name + SUFFIX)
        self._file = Appended(self.path)
        try:
            self.found = self._read(json.loads(json.dumps(header)))
            if not self._file.lines:
                self.append(header)
        except BaseException:
            self.close()
            raise

    def append(self, row: dict[str, Any]) -> None:
        """One more; on disk when this returns."""
        self._file.append([row])

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The map is written: the rows have done their work."""
        self.close()
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)

    def _read(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows behind the header."""
        try:
            rows = [
                parse_line(line, f"{self.path}: line {number}")
                for number, line in enumerate(self._file.lines, 1)
            ]
        except FormatError as error:
            raise MoeboundError(
                f"{error}; it cannot be gone on from: remove it to begin again"
            ) from error
        if rows and rows[0] != header:
            differs = [key for key in header if rows[0].get(key) != header[key]]
            raise MoeboundError(
                f"{self.path}: is of another run ({', '.join(differs)} differ): remove it, or "
                "write to another file"
            )
        return rows[1:]
