"""Reading what others wrote: sensitivity maps, routing profiles, studies. Bad input is named."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import PlanError

ROWS_FILE = "rows.jsonl"
"""The rows of a study directory, one JSON object a line, in the order in which they finished."""


@dataclass(frozen=True)
class Document:
    """A JSON file that says what it is. sha256: of its bytes, so that a plan can name it."""

    path: Path
    content: Mapping[str, Any]
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What a plan keeps of it: name and hash, and what it was measured on."""
        kept = {k: self.content[k] for k in ("model", "task", "codec") if k in self.content}
        return {"file": self.path.name, "sha256": self.sha256, **kept}


def read_document(path: Path, form: str, version: int) -> Document:
    """Raises PlanError, naming the file, for anything but this format up to this version."""
    data = _read(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: no JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != form:
        raise PlanError(f"{path}: expected format {form!r}, found {found!r}")
    given = content.get("version")
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= version:
        raise PlanError(f"{path}: version {given!r}: this moebound reads up to {version}")
    return Document(path, content, hashlib.sha256(data).hexdigest())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """A study's rows. A torn last line (a run killed while writing it) is left out.

    Raises PlanError if there are none, or a line before the last is no JSON object.
    """
    path = folder / ROWS_FILE
    lines = [line for line in _read(path).split(b"\n") if line.strip()]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise PlanError(f"{path}: line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise PlanError(f"{path}: line {number}: expected an object, found {line[:40]!r}")
        rows.append(row)
    if not rows:
        raise PlanError(f"{path}: no finished rows")
    return rows


def number(value: Any, what: str) -> float:
    """A finite number of 0 or more. Raises PlanError, with `what` in front."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PlanError(f"{what}: expected a finite number, found {value!r}")
    if value < 0:
        raise PlanError(f"{what}: expected 0 or more, found {value!r}")
    return float(value)


def numbers(value: Any, count: int | None, what: str) -> list[float]:
    """A list of them, `count` long where that is given."""
    if not isinstance(value, list) or not value or (count is not None and len(value) != count):
        expected = "a list of numbers" if count is None else f"{count} numbers"
        raise PlanError(f"{what}: expected {expected}, found {str(value)[:60]}")
    return [number(item, what) for item in value]


def index(value: Any, what: str) -> int:
    """A whole number of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlanError(f"{what}: expected a whole number from 0, found {value!r}")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror or error}") from error
