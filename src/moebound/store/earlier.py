"""What an earlier run has left: a store, work to go on with, or something in the way."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Literal

from moebound.errors import MoeboundError, StoreError
from moebound.files.durable import disk_errors
from moebound.store.folder import WorkFolder
from moebound.store.format import CONFIG_FILE, Settings, read_settings

OnExisting = Literal["error", "resume", "overwrite"]


def finished_before(dst: Path, settings: Settings, on_existing: OnExisting) -> bool:
    """Whether dst is this run's store already. Raises StoreError if dst is in the way."""
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise StoreError(f"{dst}: expected a free name or an empty folder, found a file or link")
    with disk_errors(dst, "cannot be read"):
        if not dst.exists() or not any(dst.iterdir()):
            return False
    found = None
    if (dst / CONFIG_FILE).is_file():
        with contextlib.suppress(ValueError, OSError, MoeboundError):
            found = read_settings(json.loads((dst / CONFIG_FILE).read_bytes()))
    if on_existing == "resume":
        if found == settings:
            return True
        what = "another store" if found else "a folder that is no store"
        raise StoreError(
            f"{dst}: to be resumed, but it is {what} than this source, bound or plan, method and "
            "selection make; choose another folder, or replace a store with --overwrite"
        )
    if on_existing == "overwrite":
        if found is None:
            raise StoreError(f"{dst}: only a moebound store is overwritten, and this is none")
        return False
    raise StoreError(
        f"{dst}: exists and is not empty; choose another folder, go on with --resume "
        '(on_existing="resume"), or replace a store with --overwrite (on_existing="overwrite")'
    )


def take_up(work: WorkFolder, run: dict[str, object], settings: Settings) -> bool:
    """Whether an earlier run's work goes on. Raises StoreError if it is another run's."""
    if work.sealed:
        with disk_errors(work.path, "cannot be read"):
            config = json.loads((work.path / CONFIG_FILE).read_bytes())
        if read_settings(config) == settings:
            return True
        raise StoreError(
            f"{work.path}: an earlier run with another source, bound or plan, method or selection "
            "was killed here; give the same ones to finish it, or --overwrite"
        )
    earlier = work.journal()
    if earlier is None:
        return False
    differing = sorted(k for k in run.keys() | earlier.keys() if run.get(k) != earlier.get(k))
    if differing:
        found = "; ".join(f"{k} was {earlier.get(k)!r}, now {run.get(k)!r}" for k in differing)
        raise StoreError(
            f"{work.path}: unfinished work of another run ({found}); give the same ones to go on, "
            "or --overwrite to start anew"
        )
    return True
