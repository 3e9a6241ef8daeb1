"""Rows on disk: whole lines survive everything, torn ones go, damage is told."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.errors import FormatError, MoeboundError, StoreError
from moebound.files.rows import Rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def lines(path: Path) -> list[str]:
    return [json.loads(line)["condition"] for line in path.read_text().splitlines()]


@settings(max_examples=40)
@given(cut=st.integers(0, 200), names=st.lists(st.text(min_size=1), min_size=1, unique=True))
def test_a_file_cut_anywhere_is_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, cut: int, names: list[str]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with Rows(path) as rows:
        for name in names:
            rows.append({"condition": name})
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    n_whole = data.count(b"\n")
    with Rows(path) as rows:
        assert list(rows.found) == names[:n_whole]
        for name in names[n_whole:]:
            rows.append({"condition": name})
    assert lines(path) == names


def test_damage_before_the_last_line_is_told(path: Path) -> None:
    path.write_text('{"condition": "a"}\n{"condi\n{"condition": "b"}\n')
    with pytest.raises(FormatError, match=r"rows\.jsonl: line 2"):
        Rows(path)
    path.write_text('{"condition": "a"}\n[1]\n')
    with pytest.raises(FormatError, match="line 2: expected a JSON object, found"):
        Rows(path)
    path.write_text('{"condition": "a"}\n{}\n')
    with pytest.raises(FormatError, match="line 2: expected a JSON object with 'condition'"):
        Rows(path)


def test_two_runs_never_write_to_one_file(path: Path) -> None:
    with Rows(path), pytest.raises(MoeboundError, match="another run is writing"):
        Rows(path)
    with Rows(path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        Rows(tmp_path / "missing" / "rows.jsonl")


@contextmanager
def full_disk() -> Iterator[None]:
    """Files of this process may not grow beyond 64 bytes: what a disk that fills looks like.

    No fixture, which would end after pytest has written its dot, maybe to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_loses_nothing(path: Path) -> None:
    with full_disk(), Rows(path) as rows:
        rows.append({"condition": "first"})
        with pytest.raises(StoreError, match=r"the 1 lines in it are kept"):
            rows.append({"condition": "second", "more": "x" * 60})
        assert lines(path) == ["first"]
        rows.append({"condition": "third"})  # when there is room again
    assert lines(path) == ["first", "third"]
