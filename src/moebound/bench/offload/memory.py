"""What a process holds and has read, and what the operating system keeps of files."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path


def drop_pages(place: Path) -> None:
    """Have the operating system forget what it keeps of this file, or of the files below a folder.

    What is not yet written to the disk, and what a process has mapped, stays.
    """
    for file in place.rglob("*") if place.is_dir() else [place]:
        if file.is_file():
            with contextlib.suppress(OSError), open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident_bytes() -> int:
    """Of this program: what getrusage says is inherited from whoever started it."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def disk_bytes() -> int:
    """Bytes that this process had read from a disk; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/io", encoding="ascii") as file:
        for line in file:
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0
