"""JSON documents that say what they are, on disk whole or not there; what is wrong is named.

    FORMAT = Format("moebound.plan", 1)
    save_json(path, {**FORMAT.header, "rates": [0.1, 0.3]})
    document = FORMAT.read(path)
    with fields_of(str(path)):
        rates = numbers(document.content["rates"], "rates")

Formats that several folders share have a module each in `formats/`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import FormatError, MoeboundError
from moebound.files.durable import save_bytes


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


@dataclass(frozen=True)
class Format:
    """A kind of document. version: the latest, which is written. error: what is raised of a file
    that is none."""

    name: str
    version: int
    error: type[MoeboundError] = FormatError

    @property
    def header(self) -> dict[str, Any]:
        """The first two fields of every document."""
        return {"format": self.name, "version": self.version}

    def check(self, content: Any, where: str) -> None:
        """Raises `error` unless it is an object of this format, up to this version."""
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        if found != self.name:
            raise self.error(f"{where}: expected format {self.name!r}, found {found!r}")
        given = content.get("version")
        if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= self.version:
            raise self.error(
                f"{where}: version {given!r}: this moebound reads up to {self.version}"
            )

    def read(self, path: Path) -> Document:
        """Raises `error` for a file that cannot be read, or is something else."""
        try:
            data = read_bytes(path)
            content = parse_json(data, str(path))
        except MoeboundError as error:
            raise self.error(str(error)) from error
        self.check(content, str(path))
        return Document(path, content, hashlib.sha256(data).hexdigest())


def save_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. Raises StoreError if the disk refuses."""
    save_bytes(path, json.dumps(document, allow_nan=False).encode())


def read_bytes(path: Path) -> bytes:
    """Raises MoeboundError, naming the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MoeboundError(f"{path}: cannot be read: {error.strerror or error}") from error


def load_json(path: Path) -> Any:
    """Raises MoeboundError for a file that cannot be read, FormatError for one that is no JSON."""
    return parse_json(read_bytes(path), str(path))


def parse_json(data: bytes | str, where: str) -> Any:
    """Raises FormatError for what is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON: {error}") from error


@contextmanager
def fields_of(where: str, error_class: type[MoeboundError] = FormatError) -> Iterator[None]:
    """Fields are read inside: what is wrong with one is raised as this, with `where` in front."""
    try:
        yield
    except KeyError as error:
        raise error_class(f"{where}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError, MoeboundError) as error:
        raise error_class(f"{where}: {error}") from error


def items(value: Any, what: str) -> list[Any]:
    """A list, of anything. This and the next raise FormatError, with `what` in front."""
    if not isinstance(value, list):
        raise FormatError(f"{what}: expected a list, found {type(value).__name__}")
    return value


def count(value: Any, what: str, *, most: int | None = None) -> int:
    """A whole number of 0 or more."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0 or (most is not None and value > most):
        to = "" if most is None else f" to {most}"
        raise FormatError(f"{what}: expected a whole number from 0{to}, found {value!r}")
    return int(value)


def number(value: Any, what: str, *, least: float | None = 0.0) -> float:
    """A finite number, of 0 or more unless another `least` is given; None for any."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{what}: expected a finite number, found {value!r}")
    if least is not None and value < least:
        raise FormatError(f"{what}: expected {least:g} or more, found {value!r}")
    return float(value)


def numbers(
    value: Any, what: str, *, n: int | None = None, least: float | None = 0.0
) -> tuple[float, ...]:
    """A list of them: n, or at least one."""
    if not isinstance(value, list) or not value or (n is not None and len(value) != n):
        expected = "a list of numbers" if n is None else f"{n} numbers"
        raise FormatError(f"{what}: expected {expected}, found {str(value)[:60]}")
    return tuple(number(item, what, least=least) for item in value)
