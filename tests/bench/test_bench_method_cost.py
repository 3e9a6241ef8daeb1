"""bench/method_cost.py: a method's row, one that takes too long, and going on from rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moebound.cli.main import main
from moebound.methods import get_method
from moebound.wordmath.builtin import MODELS
from untrained import untrained

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "method_cost", raising=False)
    import method_cost

    return method_cost


def test_a_process_is_ended_when_its_time_is_over(script: Any) -> None:
    found = script.measured(sys.executable, "-S", "-c", "print(7)\nwhile True: pass", limit=1)
    assert found["code"] != 0
    assert 0.9 <= found["cpu_seconds"] < 3
    well = script.measured(sys.executable, "-S", "-c", "print(7)", limit=1)
    assert (well["code"], well["out"]) == (0, "7\n")
    assert 1 < well["peak_mib"] < 1000


def test_every_method_is_one(script: Any) -> None:
    for asked in script.METHODS:
        setting, _, rate = asked.partition("@")
        assert bool(rate) == get_method(setting).needs_bound


@pytest.mark.slow
def test_rows_and_going_on_from_them(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, stats = str(untrained(tmp_path / "model", MODELS[1])), tmp_path / "stats"
    told = ["calibrate", source, "--task", "wordmath", "--limit", "2", "--diagonal", "-q"]
    assert main([*told, "-o", str(stats)]) == 0
    monkeypatch.setattr(script, "made", lambda *_: (Path(source), stats))
    asked = ["rtn:int4:g32", "calibrated@0.3", "svd:b40"]
    line = ["method_cost.py", "--work", str(tmp_path / "work"), "--methods", ",".join(asked)]
    monkeypatch.setattr(sys, "argv", line)
    capsys.readouterr()
    script.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["condition"] for row in rows] == asked
    assert rows[0]["guarantee"] == "none"
    assert rows[0]["bits_per_weight"] == pytest.approx(4.7, abs=0.3)
    assert rows[1]["guarantee"] == "max_abs"
    assert "the most" in rows[2]["reason"]
    monkeypatch.setattr(script, "measured", lambda *_, **__: pytest.fail("measured again"))
    script.main()
    assert json.loads(capsys.readouterr().out)["rows"] == rows
