"""docs/offload.md: its code runs, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.offload.predictors import PREDICTORS
from moebound.store import compress
from moebound.types import ErrorBound
from moebound.wordmath.builtin import resolve

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "offload.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path) -> None:
    source = open_checkpoint(resolve("builtin:wordmath"))
    compress(source, tmp_path / "store", bound=ErrorBound(0.3, "rate"), layers={1, 2, 3})
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {"store": tmp_path / "store"})


def test_files_and_predictors() -> None:
    for name in re.findall(r"\b([a-z_]+\.py)\b", TEXT):
        places = (
            "src/moebound/offload",
            "src/moebound/model",
            "src/moebound/text",
            "tests/offload",
            "bench",
            "tests/bench",
        )
        files = [ROOT / place / name for place in places]
        assert any(file.exists() for file in files), name
    assert all(f'"{name}"' in TEXT for name in PREDICTORS)
