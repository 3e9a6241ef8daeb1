"""Appended lines: whole ones survive everything, and nothing is touched before an append."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moebound.errors import FormatError, MoeboundError
from moebound.files.appended import Appended, parse_line, whole_lines


def test_a_torn_line_goes_with_the_next_append_and_no_sooner(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    torn = b'{"a": 1}\n{"b": "\xc3\xa9"}\n{"c": '
    path.write_bytes(torn)
    with Appended(path) as file:
        assert file.lines == [b'{"a": 1}', b'{"b": "\xc3\xa9"}']
        assert path.read_bytes() == torn
        file.append([{"d": "é"}, {"e": 2}])
    assert [json.loads(line) for line in whole_lines(path.read_bytes())] == [
        {"a": 1}, {"b": "é"}, {"d": "é"}, {"e": 2},
    ]  # fmt: skip


def test_text_as_it_is_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with Appended(path) as file:
        assert file.is_empty
        file.append([{"a": "é\n\ud800"}], ensure_ascii=False)
    assert path.read_bytes() == b'{"a": "\xc3\xa9\\n\xed\xa0\x80"}\n'
    with Appended(path) as file:
        assert not file.is_empty


def test_what_is_no_json_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with Appended(path) as file, pytest.raises(ValueError, match="Out of range"):
        file.append([{"a": 1}, {"b": math.nan}])
    assert path.read_bytes() == b""


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with Appended(path), pytest.raises(MoeboundError, match="lines: another run is writing"):
        Appended(path)
    with Appended(path):
        pass


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff", b"3", b"[" * 100_000])
def test_lines_that_are_none(line: bytes) -> None:
    with pytest.raises(FormatError, match="here: "):
        parse_line(line, "here")
