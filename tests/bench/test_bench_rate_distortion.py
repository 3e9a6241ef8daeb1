"""bench/rate_distortion.py: the least number of bits, by the formula and by search; its rows."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebound.calibrate import collect, of_task
from moebound.evaluate.loading import load
from moebound.tasks import get_task

SCRIPT = Path(__file__).parents[2] / "bench" / "rate_distortion.py"
MIXTRAL = "builtin:wordmath-mixtral"


@pytest.fixture(scope="module")
def least_bits() -> Any:
    return runpy.run_path(str(SCRIPT))["least_bits"]


def test_of_white_inputs_it_is_shannons(least_bits: Any) -> None:
    for share in (0.9, 0.25, 1e-3):
        found = least_bits(np.full(50, 3.0), 50 * 3.0 * share)
        assert found == pytest.approx(-0.5 * np.log2(share))
    assert least_bits(np.full(4, 3.0), 12.0) == 0
    assert least_bits(np.zeros(4), 0.0) == 0


@pytest.mark.parametrize("seed", range(4))
def test_water_is_filled_from_below(least_bits: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    v = np.exp(3 * rng.standard_normal((5, 20)))
    v[0, :3] = 0
    for share in (0.001, 0.1, 0.7):
        low, high = 0.0, v.max()
        for _ in range(200):
            theta = (low + high) / 2
            too_much = np.minimum(v, theta).sum() > share * v.sum()
            low, high = (low, theta) if too_much else (theta, high)
        wanted = np.maximum(0, 0.5 * np.log2(np.maximum(v, 1e-300) / theta)).sum() / v.size
        assert least_bits(v, share * v.sum()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(MIXTRAL)
    collect(loaded, of_task(loaded, get_task("wordmath"), 8), tmp_path / "stats")
    line = [str(SCRIPT), MIXTRAL, str(tmp_path / "stats"), "--rates", "0.7", "--every", "40"]
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["role"] for row in rows} == {"gate", "up", "down"}
    for row in rows:
        assert 0 < row["gap"] < row["bits_per_weight"]
        assert abs(row["overhead"]) < 0.3
    monkeypatch.setattr(sys, "argv", line)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "| 0.7 | 6 |" in capsys.readouterr().out
