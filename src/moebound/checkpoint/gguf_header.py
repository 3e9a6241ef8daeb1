"""What a GGUF file says of itself: its metadata, by key, and where its tensors are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moebound.checkpoint.leftovers import HEAD_BYTES, leftover
from moebound.errors import (
    CheckpointError,
    CorruptionError,
    FormatError,
    UnsupportedArchitectureError,
)
from moebound.files.regular import regular_file

MAGIC = b"GGUF"


@dataclass(frozen=True, eq=False)
class Header:
    """The headers of one file or of a split set, whose first file has the metadata.

    gguf: the package. readers: its `GGUFReader` of each file.
    """

    gguf: Any
    files: list[Path]
    readers: list[Any]

    @property
    def file(self) -> Path:
        return self.files[0]

    @cached_property
    def arch(self) -> str:
        """`general.architecture`. Raises UnsupportedArchitectureError where it is no text."""
        name = self.value("general.architecture")
        if not isinstance(name, str):
            raise UnsupportedArchitectureError(f"{self.file}: GGUF architecture {name!r}")
        return name

    def value(self, key: str) -> Any:
        """The value of a whole key, None where there is none. Raises CorruptionError."""
        field = self.readers[0].fields.get(key)
        if field is None:
            return None
        try:
            return field.contents()
        except Exception as error:  # gguf raises what NumPy does of bytes that are no such value
            raise CorruptionError(f"{self.file}: {key}: cannot be read: {error}") from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of the architecture; of one for each layer the one that all have.

        Raises CheckpointError where layers differ.
        """
        found = self.value(f"{self.arch}.{key}")
        if isinstance(found, list):
            if any(other != found[0] for other in found):
                raise CheckpointError(
                    f"{self.file}: {self.arch}.{key} differs by layer ({found}), expected one value"
                )
            found = found[0] if found else None
        return default if found is None else found

    def need(self, key: str) -> Any:
        """As `get`. Raises CheckpointError where it is missing."""
        found = self.get(key)
        if found is None:
            raise CheckpointError(
                f"{self.file}: its metadata have no {self.arch}.{key}, without which the model's "
                "config cannot be told; compress the model's own checkpoint"
            )
        return found

    def refuse(self, what: str) -> UnsupportedArchitectureError:
        """The error of something that no config could say."""
        return UnsupportedArchitectureError(
            f"{self.file}: has {what}, which is not read from GGUF; compress the model's own "
            "checkpoint"
        )

    @cached_property
    def tensors(self) -> Mapping[str, tuple[Path, Any]]:
        """By name: which file has it, and what `gguf` says of it. Raises CorruptionError."""
        found: dict[str, tuple[Path, Any]] = {}
        for file, tensor in self._all():
            if tensor.name in found:
                raise CorruptionError(f"{file}: tensor {tensor.name!r} is there twice")
            found[tensor.name] = file, tensor
        return found

    def _all(self) -> Iterator[tuple[Path, Any]]:
        for file, reader in zip(self.files, self.readers, strict=True):
            for tensor in reader.tensors:
                yield file, tensor


def read_header(gguf: Any, files: list[Path]) -> Header:
    """Raises FormatError, CorruptionError or CheckpointError for a file that is none, or is not
    whole."""
    return Header(gguf, files, [_reader(gguf, file) for file in files])


def _reader(gguf: Any, file: Path) -> Any:
    try:
        with regular_file(file) as (fd, _):
            head = os.pread(fd, max(HEAD_BYTES, 4), 0)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if head[:4] != MAGIC:
        instead = leftover(head) or f"begins with {head[:4]!r}, expected {MAGIC!r}"
        raise FormatError(f"{file}: not a GGUF file: {instead}")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # gguf raises what NumPy does of a file that is cut or wrong
        raise CorruptionError(
            f"{file}: cannot be read as GGUF: {error} ({type(error).__name__}); it is cut short or "
            "damaged, or of types that the installed gguf does not know"
        ) from error
    size = file.stat().st_size
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise CorruptionError(
                f"{file}: tensor {tensor.name!r} ends at byte {end}, the file has {size}; it is "
                "cut short, download it again"
            )
    return reader
