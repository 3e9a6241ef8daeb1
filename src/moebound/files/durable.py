"""Files that appear whole or not at all: written beside their name, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from moebound.errors import StoreError

PARTIAL_SUFFIX = ".partial"


@contextlib.contextmanager
def disk_errors(path: Path, doing: str = "cannot be written") -> Iterator[None]:
    """Turn the operating system's refusals into StoreError with the file's name."""
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else path
        raise StoreError(f"{at}: {doing}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable: a rename is only once the folder is."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class PartialFile:
    """`<name>.partial`, open for writing at offsets, until finish() gives it its name.

    Thread safe for writes. Raises StoreError, naming the file, if the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._fd = -1
        with disk_errors(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
            self._fd = os.open(self._partial, flags, 0o666)

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """All of data, at this offset."""
        view, done = memoryview(data), 0
        with disk_errors(self._path):
            while done < len(view):  # one call writes at most 2 GiB
                done += os.pwrite(self._fd, view[done:], offset + done)

    def finish(self) -> None:
        """Sync it and put it in its place."""
        with disk_errors(self._path):
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.replace(self._partial, self._path)
            sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was written. Does nothing to a finished file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._partial.unlink(missing_ok=True)


def save_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file, whole or not at all. Raises StoreError if the disk refuses."""
    file = PartialFile(path)
    try:
        file.write(data, 0)
        file.finish()
    except BaseException:
        file.discard()
        raise
