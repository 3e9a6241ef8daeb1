"""What is finished of a map, in a file beside it: killed at any moment, the next run goes on.

One JSON object a line, appended and synced; a torn last line is cut off. The first line says what
the rows are of, and rows of anything else are refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moebound.checkpoint.durable import disk_errors
from moebound.errors import MoeboundError

SUFFIX = ".rows.partial"


class Rows:
    """The rows of one run. Use `open` ... `append` ... `remove`."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """path: of the finished file, beside which the rows are.

        Raises MoeboundError if there are rows of another run, StoreError if the disk refuses.
        """
        self.path = path.with_name(path.name + SUFFIX)
        self.found: list[dict[str, Any]] = []
        whole = self._read(header) if self.path.exists() else 0
        with disk_errors(self.path):
            self._file = self.path.open("r+b" if whole else "wb")
            self._file.truncate(whole)
            self._file.seek(whole)
        if not whole:
            self.append(header)

    def append(self, row: dict[str, Any]) -> None:
        """One more; on disk when this returns."""
        with disk_errors(self.path):
            self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The map is written: the rows have done their work."""
        self.close()
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)

    def _read(self, header: dict[str, Any]) -> int:
        """Fill `found`; returns the bytes of whole lines."""
        with disk_errors(self.path, "cannot be read"):
            data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].splitlines()
        if not lines:
            return 0
        try:
            rows = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise MoeboundError(
                f"{self.path}: cannot be gone on from: {error}; remove it to begin again"
            ) from error
        if rows[0] != json.loads(json.dumps(header)):
            differs = [
                key for key in header if rows[0].get(key) != json.loads(json.dumps(header[key]))
            ]
            raise MoeboundError(
                f"{self.path}: is of another run ({', '.join(differs)} differ): remove it, or "
                "write to another file"
            )
        self.found = rows[1:]
        return whole
