"""The plot of stored quality rows: each is drawn once, in both panels, where it was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def test_every_row_in_both_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    module: Any = importlib.import_module("plot_quality")
    stored = json.loads((ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))

    axes = module.plot_quality(stored).axes
    assert [axis.get_title() for axis in axes] == [title for _, _, title in module.PANELS]
    for axis, (kl, _, _) in zip(axes, module.PANELS, strict=True):
        drawn = [
            (float(x), float(y))
            for container in axis.containers
            for x, y in zip(*container.lines[0].get_data(), strict=True)
        ]
        measured = [(row["bits_per_weight"], row["fidelity"][kl]) for row in stored["rows"]]
        assert sorted(drawn) == sorted(measured)
