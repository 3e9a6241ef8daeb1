"""A memory limit that counts the page cache: a Linux control group around one process.

Files that a process reads or maps are memory too: on a machine with less of it they would have to
be read again. A control group counts them, and makes the kernel drop them where its limit is
reached; what cannot be dropped ends the process. Pages that were in memory before count for whoever
had them read, so files that are to be measured have to be dropped first.

Both interfaces of the kernel: v1 (memory.limit_in_bytes) and v2 (memory.max). A group is made below
that of this process, so limits on this process hold as well. With v2 a group that has processes
cannot have groups below it that have limits: then beside it, or further up.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moebound.errors import BackendUnavailable

Version = Literal[1, 2]

_ENTER = 'echo $$ > "$0" && exec "$@"'
"""For a shell: it moves itself into the group, and becomes the program."""


@dataclass(frozen=True)
class Hierarchy:
    """Where memory groups are. mount: their topmost folder. own: that of this process."""

    version: Version
    mount: Path
    own: Path

    def places(self) -> Iterator[Path]:
        """Groups that one may be made in, the nearest first."""
        yield self.own
        if self.version == 2:
            for folder in self.own.parents:
                if folder.is_relative_to(self.mount):
                    yield folder


@dataclass(frozen=True)
class MemoryGroup:
    """A group with a limit, in bytes, for one process and those that it starts."""

    folder: Path
    version: Version
    limit_bytes: int

    def command(self, program: list[str]) -> list[str]:
        """What to start instead of this program, so that it begins inside of the group."""
        return ["/bin/sh", "-c", _ENTER, str(self.folder / "cgroup.procs"), *program]

    @property
    def peak_bytes(self) -> int | None:
        """The most that was counted at a time, page cache included; None where the kernel does not
        say (v2 before Linux 5.19)."""
        name = "memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"
        with contextlib.suppress(OSError):
            return int((self.folder / name).read_text(encoding="ascii"))
        return None

    @property
    def kills(self) -> int:
        """Processes that were ended because the limit was reached and nothing could be dropped."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        for line in (self.folder / name).read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group, removed at the end; its processes have to have ended by then.

    Raises BackendUnavailable where none can be made; the message says what is missing.
    """
    hierarchy = find_hierarchy(
        _read(Path("/proc/self/cgroup")), _read(Path("/proc/self/mountinfo"))
    )
    group = _make(hierarchy, limit_bytes)
    try:
        yield group
    finally:
        _remove(group)


def find_hierarchy(groups: str, mounts: str) -> Hierarchy:
    """From the texts of /proc/self/cgroup and /proc/self/mountinfo (man 7 cgroups, man 5 proc).

    Raises BackendUnavailable where no memory controller is mounted.
    """
    paths = dict[str, str]()
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path  # "" is version 2
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        _, _, _, root, point, *_ = head.split()
        kind, _, options = tail.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in paths:
            return Hierarchy(1, Path(point), _below(point, root, paths["memory"]))
        if kind == "cgroup2" and "memory" not in paths and "" in paths:
            return Hierarchy(2, Path(point), _below(point, root, paths[""]))
    raise BackendUnavailable(
        "no memory limit can be set: this needs Linux with the memory controller of control groups "
        "mounted (usually at /sys/fs/cgroup), and /proc/self/mountinfo has none"
    )


def _below(point: str, root: str, path: str) -> Path:
    """The folder of a group: inside of a container its path may begin above what is mounted."""
    inside = os.path.relpath(path, root) if root != "/" else path.lstrip("/")
    return Path(point) if inside.startswith("..") else Path(point) / inside


def _make(hierarchy: Hierarchy, limit_bytes: int) -> MemoryGroup:
    name = f"moebound-{os.getpid()}-{secrets.token_hex(4)}"
    files = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        if hierarchy.version == 1
        else ("memory.max", "memory.swap.max")
    )
    swap = str(limit_bytes if hierarchy.version == 1 else 0)
    refused = ""
    for place in hierarchy.places():
        group = MemoryGroup(place / name, hierarchy.version, limit_bytes)
        try:
            if hierarchy.version == 2:
                _hand_down(place)
            group.folder.mkdir()
        except OSError as error:
            refused = refused or f"{place}: {error.strerror or error}"
            continue
        try:
            _write(group.folder / files[0], str(limit_bytes))
            with contextlib.suppress(OSError):  # a kernel that does not count swap
                _write(group.folder / files[1], swap)
        except OSError as error:
            refused = refused or f"{group.folder / files[0]}: {error.strerror or error}"
            with contextlib.suppress(OSError):
                group.folder.rmdir()
            continue
        return group
    raise BackendUnavailable(
        f"no memory limit can be set: {refused}; expected to be allowed to make a control group "
        f"there (as root, or in one that was delegated to this user)"
    )


def _hand_down(place: Path) -> None:
    """Version 2: have the groups below this one count memory."""
    control = place / "cgroup.subtree_control"
    if "memory" not in control.read_text(encoding="ascii").split():
        _write(control, "+memory")


def _write(file: Path, text: str) -> None:
    """Into a file of the kernel's: never makes one."""
    handle = os.open(file, os.O_WRONLY)
    try:
        os.write(handle, text.encode("ascii"))
    finally:
        os.close(handle)


def _remove(group: MemoryGroup) -> None:
    """The kernel may need a moment to let go of a process that has ended. A group that stays is
    empty and limits nobody."""
    for _ in range(20):
        with contextlib.suppress(OSError):
            if group.version == 1:
                _write(group.folder / "memory.force_empty", "0")
            group.folder.rmdir()
            return
        time.sleep(0.05)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise BackendUnavailable(
            f"no memory limit can be set: {file}: {error.strerror or error}; control groups need "
            "Linux"
        ) from error
