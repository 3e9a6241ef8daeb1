"""moebound bench offload on a small model: its runs, its rows, and real memory readings."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from moebound.bench.offload import OffloadReport, Settings, render_offload, run
from moebound.bench.offload.model import Shapes, make_checkpoint, make_store
from moebound.bench.offload.routing import ForcedRouting
from moebound.bench.offload.table import modelled_s
from moebound.cache import ZipfTrace
from moebound.errors import CacheError
from moebound.runtime.images import open_images

SHAPES = Shapes(layers=2, experts=32, hidden=512, intermediate=352, top_k=4, vocab=256)
EXPERT_BYTES = 2 * SHAPES.layers * SHAPES.experts * SHAPES.expert_weights


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> OffloadReport:
    settings = Settings(
        shapes=SHAPES, budgets=(0.35,), tiers=("disk",), prompt=4, warm=2, tokens=4,
        peers=("stock", "accelerate"),
    )  # fmt: skip
    return run(settings, tmp_path_factory.mktemp("offload"))


def row(report: OffloadReport, name: str) -> dict[str, Any]:
    (found,) = [row for row in report.rows if row["name"] == name]
    assert "error" not in found, found
    return found


def test_every_run_gives_the_same_tokens_as_its_peer(report: OffloadReport) -> None:
    raw, stock = row(report, "raw, disk"), row(report, "stock")
    assert raw["logits_sum"] == pytest.approx(stock["logits_sum"], rel=0.05, abs=1.0)
    accelerate = row(report, "accelerate")
    assert accelerate["logits_sum"] == pytest.approx(stock["logits_sum"], rel=0.05, abs=1.0)
    assert len(raw["tpot_s"]) == 4
    assert raw["stats"]["hit_ratio"] == row(report, "compressed, disk")["stats"]["hit_ratio"]


def test_bytes(report: OffloadReport) -> None:
    assert report.expert_bytes["raw"] == EXPERT_BYTES
    assert report.expert_bytes["compressed"] < EXPERT_BYTES / 4
    raw, small = row(report, "raw, disk"), row(report, "compressed, disk")
    assert small["stats"]["bytes_moved"] < raw["stats"]["bytes_moved"] / 4


def test_memory(report: OffloadReport) -> None:
    """Real readings: the experts that do not fit are in no process's memory."""
    stock = row(report, "stock")["rss_peak_bytes"]
    for name in ("raw, disk", "compressed, disk"):
        found = row(report, name)
        choice = found["stats"]["choice"]
        assert choice["cache_bytes"] <= 0.35 * EXPERT_BYTES
        saved = EXPERT_BYTES - choice["cache_bytes"] - choice["buffer_bytes"]
        assert found["rss_peak_bytes"] <= stock - 0.6 * saved


def test_policies_of_the_trace(report: OffloadReport) -> None:
    (found,) = report.policies
    assert found["budget"] == 0.35
    assert found["hit_ratios"][found["policy"]] == found["hit_ratio"]
    assert 0 < found["share_of_limit"] <= 1


def test_table_and_bound(report: OffloadReport) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(render_offload(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "compressed, disk" in text
    assert "accelerate" in text
    assert modelled_s(row(report, "raw, disk")) > 0
    assert (
        json.loads(json.dumps(report.to_json(), default=str))["format"] == "moebound.bench.offload"
    )


def test_a_run_that_fails_is_a_row(tmp_path: Path) -> None:
    settings = Settings(shapes=replace(SHAPES, layers=1, experts=8, hidden=64, intermediate=64),
                        budgets=(0.01,), tiers=("disk",), peers=(), tokens=2)  # fmt: skip
    found = run(settings, tmp_path)
    assert all("smallest budget" in row["error"] for row in found.rows)


def test_checkpoint_and_store_are_made_once(tmp_path: Path) -> None:
    shapes = replace(SHAPES, layers=1, experts=4, hidden=64, intermediate=64, top_k=2)
    raw = make_checkpoint(tmp_path / "raw", shapes)
    made = (raw / "config.json").stat().st_mtime_ns
    assert make_checkpoint(tmp_path / "raw", shapes) == raw
    assert (raw / "config.json").stat().st_mtime_ns == made
    store = make_store(raw, tmp_path / "store", 0.3)
    assert open_images(store).n_weights == open_images(raw).n_weights == 4 * shapes.expert_weights


def test_forced_routing(tmp_path: Path) -> None:
    shapes = replace(SHAPES, layers=2, experts=8, hidden=64, intermediate=64, top_k=2)
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "raw", shapes))
    trace = ZipfTrace(layers=2, experts=8, top_k=2, tokens=12, sequences=1, prompt=4).draw()
    routing = ForcedRouting(model, trace, top_k=2)
    seen: list[np.ndarray] = []
    model.model.layers[2].mlp.experts.register_forward_pre_hook(
        lambda module, args: seen.append(args[1].numpy())
    )
    routing.begin(3)
    with torch.inference_mode():
        model(torch.arange(5)[None])
    assert np.array_equal(seen[0], trace.layers[1].index[3:8])
    with pytest.raises(CacheError, match="the model has 4 of 8"):
        ForcedRouting(model, trace, top_k=4)
