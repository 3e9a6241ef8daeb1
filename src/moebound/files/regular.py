"""Open a file that was given by name, if it is an ordinary one.

A pipe blocks whoever opens it, and a device may have no end. Both can have any name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextmanager
def regular_file(file: Path | str) -> Iterator[tuple[int, int]]:
    """A descriptor to read from, and the file's size. Never waits.

    Raises OSError, with the kind in its `strerror`, for what is no ordinary file.
    """
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise OSError(errno.EINVAL, f"expected an ordinary file, found {kind}", str(file))
        yield fd, found.st_size
    finally:
        os.close(fd)


def read_whole(file: Path | str, most: int) -> bytes | None:
    """A file's bytes; None if they are more than `most`. Raises OSError as `regular_file`."""
    with regular_file(file) as (fd, size):
        if size > most:
            return None
        parts, left = list[bytes](), most + 1  # it may have grown since
        while left and (part := os.read(fd, min(left, 1 << 24))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts) if left else None
