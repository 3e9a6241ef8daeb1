"""Where a store may be written, and what is left when the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moebound.errors import StoreError
from moebound.store import open_store, verify
from moebound.types import ErrorBound

from .conftest import RATE, MakeSource, MakeStore, contents, run


def test_existing_folder_is_an_error(source: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for on_existing, message in (
        ("error", "exists and is not empty"),
        ("resume", "a folder that is no store"),
        ("overwrite", "only a moebound store is overwritten"),
    ):
        with pytest.raises(StoreError, match=message):
            run(source(), tmp_path, on_existing=on_existing)
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_empty_folder_is_fine(source: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    run(source(), tmp_path / "dst")
    assert [f.name for f in tmp_path.iterdir()] == ["dst"]


def test_a_file_in_the_way(source: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="found a file or link"):
        run(source(), tmp_path / "file", on_existing="overwrite")
    with pytest.raises(StoreError, match="file"):
        run(source(), tmp_path / "file" / "below")


def test_unwritable_folder(
    source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"dst\.partial: cannot be made: Permission denied"):
        run(source(), tmp_path / "dst")


@pytest.mark.parametrize("below", ["", "inside", "deep/inside"])
def test_destination_in_the_source(below: str, source: MakeSource, tmp_path: Path) -> None:
    src = Path(shutil.copytree(source(), tmp_path / "src"))
    before = contents(src)
    with pytest.raises(StoreError, match="destination"):
        run(src, src / below, on_existing="overwrite")
    with pytest.raises(StoreError, match="inside the destination"):
        run(src, tmp_path, on_existing="overwrite")
    assert contents(src) == before


def test_overwrite_replaces_a_store(source: MakeSource, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    run(source(), dst)
    run(source(), tmp_path / "other", bound=ErrorBound(0.3, "rate"))
    run(source(), dst, bound=ErrorBound(0.3, "rate"), on_existing="overwrite")
    assert contents(dst) == contents(tmp_path / "other")
    assert {f.name for f in tmp_path.iterdir()} == {"dst", "other"}


def test_resume_leaves_its_own_finished_store_alone(source: MakeSource, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    first = run(source(), dst)
    times = {f.name: f.stat().st_mtime_ns for f in dst.iterdir()}
    again = run(source(), dst, on_existing="resume")
    assert again.resumed
    assert again.expert_bytes_after == first.expert_bytes_after
    assert again.store_bytes == first.store_bytes
    assert {f.name: f.stat().st_mtime_ns for f in dst.iterdir()} == times
    with pytest.raises(StoreError, match="another store"):
        run(source(), dst, on_existing="resume", codec="raw")


def test_a_second_process_is_kept_out(source: MakeSource, tmp_path: Path) -> None:
    partial = tmp_path / "dst.partial"
    partial.mkdir()
    fd = os.open(partial / "moebound.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process is writing here"):
            run(source(), tmp_path / "dst")
    finally:
        os.close(fd)
    run(source(), tmp_path / "dst")


def test_someone_elses_partial_folder(source: MakeSource, tmp_path: Path) -> None:
    (tmp_path / "dst.partial").mkdir()
    (tmp_path / "dst.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match="not moebound's"):
        run(source(), tmp_path / "dst", on_existing="overwrite")
    assert (tmp_path / "dst.partial" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("after_writes", [0, 3, 20, 45])
def test_full_disk_loses_nothing(
    after_writes: int, source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, left = os.pwrite, after_writes

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"model-0000.*safetensors: .*No space left on device"):
        run(source(), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    finished = contents(tmp_path / "dst.partial")
    monkeypatch.undo()
    run(source(), tmp_path / "dst")
    whole = contents(tmp_path / "dst")
    for name, data in finished.items():
        if name.endswith(".safetensors"):
            assert whole[name] == data
    assert verify(tmp_path / "dst").ok


def test_unfinished_work_is_no_store(own_store: MakeStore) -> None:
    _, dst = own_store()
    (dst / "moebound.journal.json").write_text("{}")
    with pytest.raises(StoreError, match="unfinished work"):
        open_store(dst)


def test_another_runs_work_is_not_taken_up(
    source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebound.store.beside.write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(source(), tmp_path / "dst")
    monkeypatch.undo()
    kept = contents(tmp_path / "dst.partial")
    other_seed = source(seed=1)
    for src, options, named in (
        (source(), {"bound": ErrorBound(0.3, "rate", "expert")}, "bound was .*0.1.* now .*0.3"),
        (source(), {"codec": "raw"}, "method was 'bounded:bound', now 'bounded:raw'"),
        (source(), {"experts": {0}}, "experts was"),
        (other_seed, {}, "source was"),
    ):
        with pytest.raises(StoreError, match=named):
            run(src, tmp_path / "dst", on_existing="resume", **options)
    assert contents(tmp_path / "dst.partial") == kept
    moved = Path(shutil.copytree(source(), tmp_path / "moved"))
    assert run(moved, tmp_path / "dst", bound=RATE).resumed
