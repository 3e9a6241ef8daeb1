"""Reading: what a study wrote, whole, partial, torn or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebound.errors import FormatError, MoeboundError
from moebound.paper.report import make_report, read_study

from .synthetic import write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(
        tmp_path / "study", n=40, seeds=2, sources=("gaussian-sd", "codec:bound"),
        keep=lambda place: place.table in ("3", "4"),
    )  # fmt: skip


def rows_of(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study / "rows.jsonl").read_text().splitlines()]


def put(study: Path, rows: list[dict[str, Any]]) -> None:
    (study / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_bits_are_problems(study: Path) -> None:
    rows = rows_of(study)
    assert rows[0]["n"] == 40
    rows[0] |= {"n": 9, "pia": 3, "ica": 1, "valid": 9, "right": {"pia": "105", "ica": "100"}}
    put(study, rows[:1])
    row = read_study(study).rows[0]
    assert np.flatnonzero(row.right["pia"]).tolist() == [0, 2, 8]
    assert np.flatnonzero(row.right["ica"]).tolist() == [8]


def test_a_torn_last_line_is_left_out(study: Path) -> None:
    path = study / "rows.jsonl"
    whole = len(read_study(study).rows)
    path.write_bytes(path.read_bytes()[:-20])
    found = read_study(study)
    assert len(found.rows) == whole - 1
    assert len(found.missing) == 1


@pytest.mark.parametrize("keep", [0, 1, 2, 5])
def test_a_partial_study_has_a_report_that_says_so(study: Path, keep: int) -> None:
    put(study, rows_of(study)[:keep])
    report = make_report(read_study(study))
    assert any("not measured yet" in gap for gap in report.gaps)
    assert {table.id for table in report.tables} >= {"3", "4"}
    assert any("no baseline" in gap for gap in report.gaps) == (keep < 2)


def test_no_rows_file_yet(study: Path) -> None:
    (study / "rows.jsonl").unlink()
    report = make_report(read_study(study))
    assert report.counts["open"] == sum(report.counts.values())


def test_a_condition_that_comes_twice_counts_once(study: Path) -> None:
    rows = rows_of(study)
    put(study, [*rows, *rows])
    assert len(read_study(study).rows) == len(rows)


def test_rows_without_where_or_realised(study: Path) -> None:
    put(study, [row | {"where": None, "realised": None} for row in rows_of(study)])
    report = make_report(read_study(study))
    assert "no residual or routing changes recorded" in report.gaps
    assert report.verdict("cascade").outcome == "open"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("source"), "'source' is missing"),
        (lambda row: row.update(n=-1), "n: expected"),
        (lambda row: row.update(n=10**9), "n: expected"),
        (lambda row: row.update(pia=0), "bits are set"),
        (lambda row: row.update(right={"ica": "zz", "pia": "0"}), "invalid literal"),
        (lambda row: row.update(right={"ica": "f" * 10**6, "pia": "0"}), "hexadecimal digits"),
        (lambda row: row.update(right=[1, 2]), "list"),
        (lambda row: row.update(layers=[99]), "99"),
        (lambda row: row.update(layers=[]), "without layers"),
        (lambda row: row.update(kl="big"), "kl: expected"),
        (lambda row: row.update(where={"residual": ["x"]}), "where.residual"),
        (lambda row: row.update(where=7), "int"),
        (lambda row: row.update(rate=True), "rate"),
    ],
)
def test_a_damaged_row_is_named(
    study: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rows = rows_of(study)
    change(rows[3])
    put(study, rows)
    with pytest.raises(FormatError, match=r"rows\.jsonl: line 4") as caught:
        read_study(study)
    assert message in str(caught.value)


def test_a_broken_line_before_the_last_is_an_error(study: Path) -> None:
    lines = (study / "rows.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    (study / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(FormatError, match=r"line 3: not JSON"):
        read_study(study)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "found 'list'"),
        ('{"format": "moebound.profile"}', "moebound.profile"),
        ('{"format": "moebound.study", "version": 2}', "version 2"),
        ('{"format": "moebound.study", "version": 1}', "is missing"),
        ('{"format": "moebound.study", "version": 1, "layers": [1], "conditions": 3}', "int"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_folder_of_something_else(study: Path, text: str, message: str) -> None:
    (study / "study.json").write_text(text)
    with pytest.raises(FormatError, match=r"study\.json") as caught:
        read_study(study)
    assert message in str(caught.value)


def test_no_study_there(tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="no such folder"):
        read_study(tmp_path / "nowhere")
    with pytest.raises(MoeboundError, match=r"study\.json: not found"):
        read_study(tmp_path)


def test_a_profile_that_lies_elsewhere_is_not_read(study: Path) -> None:
    document = json.loads((study / "study.json").read_text())
    for name, expected in (("../secret.json", None), ("/etc/passwd", None), ("p.json", "p.json")):
        (study / "study.json").write_text(json.dumps(document | {"profile": name}))
        found = read_study(study).profile
        assert (None if found is None else found.name) == expected
