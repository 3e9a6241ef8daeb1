"""Plots of stored offloading rows: what is drawn, and what is left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moebound.bench.offload import OffloadReport

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    path = ROOT / "bench" / "plot_offload.py"
    spec = importlib.util.spec_from_file_location("plot_offload", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        (ROOT / "bench" / "results" / "offload.json").read_text(encoding="utf-8")
    )
    return document


def labels(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_stored_rows(plot: ModuleType, stored: dict[str, Any]) -> None:
    report = OffloadReport.from_json(stored)
    (axis,) = plot.plot_time(report).axes
    ours = {"raw, disk", "compressed, disk", "compressed, ram"}
    assert ours | {"stock", "accelerate"} <= set(labels(axis))
    (hits,) = plot.plot_hits(report).axes
    assert "Belady's limit" in labels(hits)
    best = next(line for line in hits.lines if line.get_label() == "best policy, simulated")
    assert list(best.get_ydata()) == [100 * row["hit_ratio"] for row in report.policies]


def test_a_panel_for_each_routing_and_a_dotted_model(
    plot: ModuleType, stored: dict[str, Any]
) -> None:
    """Rows of today: runs of two kinds of routing, one that failed, a peer, within a limit."""
    rows = [{**row, "routing": "forced", "prompt_stats": {}} for row in stored["rows"]]
    rows += [{**row, "routing": "own"} for row in rows if row["how"] == "offloaded"]
    peer = next(row for row in rows if row["how"] == "stock")
    rows.append({**peer, "how": "llama.cpp", "routing": "own"})
    rows.append({**peer, "how": "accelerate", "routing": "own", "error": "killed"})
    settings = {**stored["settings"], "memory_limit": 2_000_000_000}
    report = OffloadReport.from_json({**stored, "version": 2, "rows": rows, "settings": settings})
    figure = plot.plot_time(report)
    forced, own = figure.axes
    assert "cost model, overlapped" in labels(forced)
    assert "llama.cpp" in labels(own)
    assert "llama.cpp" not in labels(forced)
    assert "accelerate" not in labels(own)
    assert "2 GB" in figure.get_suptitle()
    (hits,) = plot.plot_hits(report).axes
    assert "compressed, disk, own routing" in labels(hits)
