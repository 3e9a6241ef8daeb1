"""bench/plan_quality.py takes the model that its map is of."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from moebound.cli.main import main
from moebound.wordmath.builtin import MODELS
from untrained import untrained

SCRIPT = Path(__file__).parents[2] / "bench" / "plan_quality.py"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_rows_of_either_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, found = str(untrained(tmp_path / "model", model)), tmp_path / "map.json"
    told = ["--task", "wordmath", "--limit", "2", "--rates", "0.3,0.8", "--measure", "none"]
    assert main(["sensitivity", src, *told, "--ties", "0", "-o", str(found), "-q"]) == 0
    capsys.readouterr()
    line = ["--src", src, "--task", "wordmath", "--bpw", "4", "--skip", "2", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(found), *line, "--measure", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    document = json.loads(capsys.readouterr().out)
    assert document["source"] == src
    assert [row["scheme"] for row in document["rows"]] == ["uniform", "layer", "sensitivity"]
    for row in document["rows"]:
        assert 3 < row["bits_per_weight"] <= 4.01
        assert row["kl_nats"] > 0
