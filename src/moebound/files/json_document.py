"""JSON documents on disk: whole or not there, and clear about what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moebound.errors import FormatError, MoeboundError
from moebound.files.durable import PartialFile


def save_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON, whole or not at all. Raises StoreError if the disk refuses."""
    file = PartialFile(path)
    try:
        file.write(json.dumps(document, allow_nan=False).encode(), 0)
        file.finish()
    except BaseException:
        file.discard()
        raise


def check_header(data: Any, form: str, version: int, name: str) -> None:
    """Raises FormatError unless data is a JSON object of this format and version."""
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if found != form:
        raise FormatError(f"{name}: expected format {form!r}, found {found!r}")
    if data.get("version") != version:
        raise FormatError(f"{name}: version {data.get('version')!r}, this moebound reads {version}")


def load_json(path: Path) -> Any:
    """Raises MoeboundError for a file that cannot be read, FormatError for one that is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise MoeboundError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: no JSON: {error}") from error
