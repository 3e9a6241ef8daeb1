"""`moebound study` as it is called."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moebound.cli.main import main
from moebound.files.formats.study import ROWS_FILE, read_rows, read_study
from moebound.files.rows import read_lines
from moebound.paper.study.measure import Measured, Measurer
from moebound.plan.losses import curves_from_study


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> list[str]:
    suite = tmp_path / "mine.json"
    conditions = [
        {"selector": "layer:@0", "rate": [0.3, 0.8], "source": "codec:bound", "answers": False},
        {"selector": "most-used:@1", "rate": 0.8, "source": ["uniform", "codec:sz3"]},
    ]
    suite.write_text(json.dumps({"read": 2, "conditions": conditions}))
    return ["study", str(folder), "--suite", str(suite), "--task", "wordmath", "--limit", "3",
            "-o", str(tmp_path / "out")]  # fmt: skip


def test_what_it_writes_is_read_by_report_and_plan(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["conditions"], said["measured"], said["found"]) == (5, 5, 0)
    assert main(command) == 0
    assert "0 measured now, 5 found" in capsys.readouterr().out
    found = read_study(tmp_path / "out")
    assert not found.missing
    assert [row.n for row in found.rows] == [3, 0, 0, 3, 3]
    curves = curves_from_study(read_rows(tmp_path / "out"))
    assert {layer: list(curve) for layer, curve in curves.items()} == {1: [0.3, 0.8]}


def test_interrupted_it_says_how_to_go_on(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Measurer.run

    def stopped(self: Measurer, condition: Any) -> Measured:
        if condition.source != "none":
            raise KeyboardInterrupt
        return original(self, condition)

    monkeypatch.setattr(Measurer, "run", stopped)
    assert main(command) == 130
    assert "stopped: 1 of 5 conditions are in" in capsys.readouterr().err


def test_bad_calls_are_told(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--sources", "gauss"]) == 2
    assert "'gauss': unknown" in capsys.readouterr().err
    assert main([*command, "--task", "wordmath"]) == 2
    assert "each task once" in capsys.readouterr().err
    assert main([*command, "--suite", "papers"]) == 2
    assert "expected paper, quick or a JSON file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_command_to_install_it_is_told(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "--ray", "local"]) == 2
    assert "pip install '.[ray]'" in capsys.readouterr().err


def test_without_the_library_of_a_codec_nothing_is_begun(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pysz", None)
    assert main(command) == 2
    assert "codec:sz3 needs pysz: pip install '.[peers]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long  # tests/jobs has a cluster in every run
def test_a_cluster_gives_the_same_rows(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray", reason="pip install '.[ray]'")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there: "local" asks for its own
    other = str(tmp_path / "ray")
    assert main(command) == 0
    assert main([*command[:-1], other, "--workers", "1", "--ray", "local"]) == 0
    here = {row["condition"]: row for _, row in read_lines(tmp_path / "out" / ROWS_FILE)}
    there = {row["condition"]: row for _, row in read_lines(Path(other) / ROWS_FILE)}
    assert here.keys() == there.keys()
    for key, row in here.items():
        for name in ("ica", "pia", "right", "realised", "experts_changed"):
            assert there[key][name] == row[name]
        assert there[key]["kl"] == pytest.approx(row["kl"], rel=1e-6, abs=1e-9)
