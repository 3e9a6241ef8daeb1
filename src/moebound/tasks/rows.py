"""Rows of problems from a file, or from a file on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moebound.errors import TaskError
from moebound.extras import unavailable

DATA_VARIABLE = "MOEBOUND_DATA"
"""The environment variable with a folder of data sets: gsm8k/test.jsonl, math/test.jsonl."""

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (file:line), and its fields."""


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file, or of a folder of .json files (MATH's own layout).

    Raises TaskError, naming file and line, for what cannot be read or is no object, and
    BackendUnavailable for parquet without pyarrow.
    """
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text, so no .jsonl file: {error}") from error


def _folder(path: Path) -> Iterator[Row]:
    files = sorted(path.rglob("*.json"), key=lambda file: (file.parent.name, _number(file)))
    if not files:
        raise TaskError(f"{path}: no .json files in this folder")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{file}: cannot be read: {error}") from error
        yield str(file), _object(text, str(file))


def _number(file: Path) -> tuple[int, str]:
    return (int(file.stem) if file.stem.isdecimal() else -1, file.stem)


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise TaskError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise unavailable(f"{path}: reading parquet", "pyarrow", reason=error) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise TaskError(f"{path}: cannot be read as parquet: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", row


def field(row: Mapping[str, Any], where: str, *names: str) -> str:
    """The first of these fields that the row has, as text.

    Raises TaskError, naming file, line and field, where it is missing, empty or no text.
    """
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, str) or not value.strip():
                found = "an empty text" if isinstance(value, str) else type(value).__name__
                raise TaskError(f"{where}:{name}: expected a text, found {found}")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise TaskError(f"{where}:{name}: half of a surrogate pair: no text") from error
            return value
    raise TaskError(
        f"{where}: no field {' or '.join(map(repr, names))}; found {', '.join(row) or 'none'}"
    )


def find_data(name: str, given: Path | None, *, hub: tuple[str, str]) -> Path:
    """Where the rows of a data set are.

    In this order: the file given; <folder of MOEBOUND_DATA>/<name>/test.jsonl, test.parquet or
    test/; the hub (repository, file). Raises TaskError where there is none.
    """
    if given is not None:
        if not given.exists():
            raise TaskError(f"{given}: no such file, for task {name!r}")
        return given
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        for candidate in ("test.jsonl", "test.parquet", "test"):
            if (path := Path(folder) / name / candidate).exists():
                return path
    return _from_hub(name, *hub)


def _from_hub(name: str, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # the hub client raises its own, its HTTP library's, and OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskError(
            f"task {name!r}: its problems are not in ${DATA_VARIABLE}/{name}/test.jsonl, and "
            f"{file} of data set {repository} could not be fetched from the hub: {reason}. "
            "Give a file with --data"
        ) from error
