"""The folder a store is built in, and how it becomes the store: all at once, at the very end.

Everything is written to `DST.partial`. A journal in it says what run it belongs to; when the last
file is on disk the journal goes, and then the folder is renamed. So at every moment DST either is
not there, or is what it was before, or is whole. A killed run leaves `DST.partial` (and, in the
instant of replacing an old store, `DST.replaced`), which the next run takes up.

States of DST.partial: journal -> unfinished; config.json and no journal -> whole, not yet renamed;
neither -> nothing of worth yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moebound.errors import StoreError
from moebound.files.durable import disk_errors, sync_folder

JOURNAL_FILE = "moebound.journal.json"
LOCK_FILE = "moebound.lock"


class WorkFolder:
    """`DST.partial`, locked against a second process while in use.

        with WorkFolder(dst) as work:
            if not work.take_up(run):
                work.start_over(run)
            ...                      # write into work.path
            work.seal()
            work.publish()

    Leaving the block without publish() keeps what was written, for the next run.
    Raises StoreError if the place cannot be used, or another process is at work in it.
    """

    def __init__(self, dst: Path) -> None:
        self.dst = Path(os.path.abspath(dst))
        self.path = self.dst.with_name(self.dst.name + ".partial")
        self._replaced = self.dst.with_name(self.dst.name + ".replaced")
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        with disk_errors(self.path, "cannot be made"):
            if self.path.is_dir() and any(self.path.iterdir()) and not self._is_ours():
                raise StoreError(
                    f"{self.path}: expected this name to be free for unfinished work, found a "
                    "folder that is not moebound's; move it away"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StoreError(f"{self.path}: another process is writing here") from None
        # Killed between the two renames of publish(): the old one goes back first.
        if self._replaced.is_dir() and not self.dst.exists():
            with disk_errors(self._replaced):
                os.rename(self._replaced, self.dst)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
        with contextlib.suppress(OSError):  # nothing begun, nothing left behind
            if {entry.name for entry in self.path.iterdir()} <= {LOCK_FILE}:
                (self.path / LOCK_FILE).unlink(missing_ok=True)
                self.path.rmdir()

    def _is_ours(self) -> bool:
        names = {JOURNAL_FILE, LOCK_FILE, "config.json"}
        return any((self.path / name).is_file() for name in names)

    @property
    def sealed(self) -> bool:
        """Whether everything is written and only the renaming is missing."""
        return (self.path / "config.json").is_file() and not (self.path / JOURNAL_FILE).exists()

    def journal(self) -> dict[str, Any] | None:
        """The run that left this folder, None if there was none."""
        try:
            content = json.loads((self.path / JOURNAL_FILE).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path / JOURNAL_FILE}: cannot be read: {error}") from error
        return content if isinstance(content, dict) else {}

    def start_over(self, run: Mapping[str, Any]) -> None:
        """Empty the folder and write the journal of this run."""
        with disk_errors(self.path):
            for entry in self.path.iterdir():
                if entry.name == LOCK_FILE:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            write_synced(self.path / JOURNAL_FILE, (json.dumps(run, indent=1) + "\n").encode())

    def seal(self) -> None:
        """Everything is on disk: from here on, only the renaming is left to do."""
        with disk_errors(self.path):
            (self.path / JOURNAL_FILE).unlink(missing_ok=True)
            sync_folder(self.path)

    def publish(self) -> None:
        """Put the folder in its place; what stood there before goes only after that."""
        with disk_errors(self.dst):
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            occupied = self.dst.exists() and any(self.dst.iterdir())
            if occupied:
                if self._replaced.exists():
                    shutil.rmtree(self._replaced)
                os.rename(self.dst, self._replaced)
            os.rename(self.path, self.dst)
            sync_folder(self.dst.parent)
            if self._replaced.is_dir():
                shutil.rmtree(self._replaced)


def write_synced(path: Path, data: bytes | Iterable[bytes]) -> str:
    """Write a file whole or not at all; returns the SHA-256 of its bytes. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    with open(partial, "wb") as handle:
        for piece in (data,) if isinstance(data, bytes) else data:
            handle.write(piece)
            digest.update(piece)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
    return digest.hexdigest()


def check_apart(dst: Path, src: Path) -> None:
    """Raises StoreError if one of the two folders is, or lies in, the other."""
    there, here = dst.resolve(), src.resolve()
    if there == here:
        raise StoreError(f"{dst}: the destination is the source itself; choose another folder")
    if here in there.parents:
        raise StoreError(f"{dst}: the destination lies inside the source {src}; choose another")
    if there in here.parents:
        raise StoreError(f"{dst}: the source {src} lies inside the destination; choose another")
