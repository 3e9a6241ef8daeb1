"""moebound bench offload on a small model: its runs, its rows, and real memory readings."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from forks import forked
from moebound.bench.offload import (
    OffloadReport,
    OffloadSettings,
    render_clients,
    render_offload,
    run,
)
from moebound.bench.offload.cases import cases
from moebound.bench.offload.model import Shapes, make_checkpoint, make_store
from moebound.bench.offload.prepare import prepare
from moebound.bench.offload.report import modelled_s, over_model
from moebound.bench.offload.routing import ForcedRouting, fit_trace
from moebound.bench.offload.table import _raw_twin
from moebound.cache import ZipfTrace, load_trace
from moebound.cli.main import main
from moebound.errors import CacheError, CheckpointError, FormatError, MoeboundError
from moebound.offload.entries import open_entries
from moebound.store import open_store
from moebound.tasks import get_task
from moebound.wordmath.builtin import resolve

SHAPES = Shapes(layers=2, experts=32, hidden=512, intermediate=352, top_k=4, vocab=256)
EXPERT_BYTES = 2 * SHAPES.layers * SHAPES.experts * SHAPES.expert_weights


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> OffloadReport:
    settings = OffloadSettings(
        shapes=SHAPES, budgets=(0.35,), tiers=("disk",), prompt=4, warm=2, tokens=4,
        peers=("stock", "accelerate"), routing=("forced", "own"),
    )  # fmt: skip
    with forked():
        return run(settings, tmp_path_factory.mktemp("offload"))


def row(report: OffloadReport, name: str) -> dict[str, Any]:
    (found,) = [row for row in report.rows if row["name"] == name]
    assert "error" not in found, found
    return found


def row_of(report: OffloadReport, name: str, budget: float) -> dict[str, Any]:
    (found,) = [row for row in report.rows if (row["name"], row["budget"]) == (name, budget)]
    return found


@pytest.mark.slow
def test_every_run_gives_the_same_tokens_as_its_peer(report: OffloadReport) -> None:
    raw, stock = row(report, "raw, disk"), row(report, "stock")
    assert raw["logits_sum"] == pytest.approx(stock["logits_sum"], rel=0.05, abs=1.0)
    accelerate = row(report, "accelerate")
    assert accelerate["logits_sum"] == pytest.approx(stock["logits_sum"], rel=0.05, abs=1.0)
    own, stock_own = row(report, "raw, disk, own routing"), row(report, "stock, own routing")
    assert own["logits_sum"] == pytest.approx(stock_own["logits_sum"], rel=0.05, abs=1.0)
    assert own["logits_sum"] != raw["logits_sum"]
    assert len(raw["tpot_s"]) == raw["stats"]["steps"] == raw["stats"]["tokens"] == 4
    assert (raw["prompt_stats"]["steps"], raw["prompt_stats"]["tokens"]) == (1, 4)
    assert raw["stats"]["hit_ratio"] == row(report, "compressed, disk")["stats"]["hit_ratio"]


@pytest.mark.slow
def test_bytes(report: OffloadReport) -> None:
    assert report.expert_bytes["raw"] == EXPERT_BYTES
    assert report.expert_bytes["compressed"] < EXPERT_BYTES / 4
    raw, small = row(report, "raw, disk"), row(report, "compressed, disk")
    assert small["stats"]["bytes_moved"] < raw["stats"]["bytes_moved"] / 4


@pytest.mark.slow
def test_memory(report: OffloadReport) -> None:
    """Real readings: the experts that do not fit are in no process's memory."""
    stock = row(report, "stock")["rss_peak_bytes"]
    for name in ("raw, disk", "compressed, disk"):
        found = row(report, name)
        choice = found["stats"]["choice"]
        assert choice["cache_bytes"] <= 0.35 * EXPERT_BYTES
        saved = EXPERT_BYTES - choice["cache_bytes"] - choice["buffer_bytes"]
        assert found["rss_peak_bytes"] <= stock - 0.6 * saved


@pytest.mark.slow
def test_policies_of_the_trace(report: OffloadReport) -> None:
    (found,) = report.policies
    assert found["budget"] == 0.35
    assert found["hit_ratios"][found["policy"]] == found["hit_ratio"]
    assert 0 < found["share_of_limit"] <= 1


@pytest.mark.slow
def test_table_and_bound(report: OffloadReport) -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(render_offload(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "compressed, disk" in text
    assert "accelerate" in text
    assert "compressed, disk, own routing" in text
    raw = row(report, "raw, disk")
    took = sum(raw["tpot_s"]) / 4
    assert over_model(raw) == pytest.approx(took / modelled_s(raw), rel=0.1)


@pytest.mark.slow
def test_a_stored_report_is_read_again(report: OffloadReport) -> None:
    document = json.loads(json.dumps(report.to_json()))
    assert OffloadReport.from_json(document).rows == report.rows
    for wrong in ({"version": 3}, {"format": "moebound.bench.codec"}):
        with pytest.raises(FormatError, match=r"expected moebound\.bench\.offload"):
            OffloadReport.from_json({**document, **wrong})


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_that_fails_is_a_row(tmp_path: Path) -> None:
    settings = OffloadSettings(
        shapes=replace(SHAPES, layers=1, experts=8, hidden=64, intermediate=64),
        budgets=(0.01,),
        tiers=("disk",),
        peers=(),
        tokens=2,
        clients=2,
    )
    found = run(settings, tmp_path)
    assert len(found.rows) == 4
    assert all("smallest budget" in row["error"] for row in found.rows)
    assert len(render_clients(found)) == 1


def test_linear_layers_as_codes_are_runs_of_another_store(tmp_path: Path) -> None:
    shapes = replace(SHAPES, layers=1, experts=4, hidden=64, intermediate=64, top_k=2)
    settings = OffloadSettings(
        shapes=shapes, budgets=(1.0,), tiers=("disk",), slots=("values", "codes4"),
        linears=("values", "codes"), others=0.5, peers=("stock",), prompt=2, warm=1, tokens=1,
    )  # fmt: skip
    found = list(cases(settings))
    assert [(case.name, case.slots, case.linears, case.others) for case in found] == [
        ("raw, disk", "values", "values", "keep"),
        ("compressed, disk", "values", "values", "keep"),
        ("compressed, disk, linear layers codes", "values", "codes", 0.5),
        ("compressed, disk, slots codes4", "codes4", "values", "keep"),
        ("compressed, disk, slots codes4, linear layers codes", "codes4", "codes", 0.5),
        ("stock", "values", "values", "keep"),
    ]
    made = prepare(settings, tmp_path)
    places = [made.place(case.how, case.source, linears=case.linears) for case in found]
    assert [open_store(place).settings.others for place in places[1:3]] == ["keep", 0.5]
    assert places[1] == places[3]
    assert places[2] == places[4]
    assert places[0] == places[5] == made.raw
    rows = [asdict(case) | {"tpot_p50_s": i + 1.0} for i, case in enumerate(found)]
    assert all(_raw_twin(row, rows) is rows[0] for row in rows[:5])


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_several_clients_at_a_time(tmp_path: Path) -> None:
    """Each with its part of the trace; the first one's logits are those it has alone."""
    settings = OffloadSettings(
        shapes=SHAPES, budgets=(0.35,), tiers=("disk",), prompt=4, warm=2, tokens=4, peers=(),
        clients=3,
    )  # fmt: skip
    report = run(settings, tmp_path)
    for name in ("raw, disk, 3 clients", "compressed, disk, 3 clients"):
        found = row(report, name)
        assert found["same_alone"]
        assert len(found["together"]["logits"]) == 3
        assert len(set(found["together"]["logits"])) == 3
        for n, way in ((1, "alone"), (1, "one"), (3, "together")):
            assert found[way]["stats"]["tokens"] == n * (4 + 4)
            assert found[way]["stats"]["steps"] == 1 + 4
        # One pass's visits are shared, and never more than those of three apart.
        accesses = {way: sum(found[way]["stats"]["tiers"].values()) for way in ("one", "together")}
        assert accesses["one"] < accesses["together"] < 3 * accesses["one"]
        assert found["ratio"] == pytest.approx(
            found["together"]["tokens_per_s"] / found["alone"]["tokens_per_s"]
        )
    console = Console(width=200, file=io.StringIO())
    for table in render_clients(report):
        console.print(table)
    assert "compressed, disk, 3 clients" in console.file.getvalue()  # type: ignore[attr-defined]
    console = Console(width=200, file=io.StringIO())
    console.print(render_offload(report))
    assert "clients" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_checkpoint_and_store_are_made_once(tmp_path: Path) -> None:
    shapes = replace(SHAPES, layers=1, experts=4, hidden=64, intermediate=64, top_k=2)
    raw = make_checkpoint(tmp_path / "raw", shapes)
    made = (raw / "config.json").stat().st_mtime_ns
    assert make_checkpoint(tmp_path / "raw", shapes) == raw
    assert (raw / "config.json").stat().st_mtime_ns == made
    store = make_store(raw, tmp_path / "store", 0.3)
    assert open_entries(store).n_weights == open_entries(raw).n_weights == 4 * shapes.expert_weights


def test_a_checkpoint_of_other_shapes_is_in_the_way(tmp_path: Path) -> None:
    shapes = replace(SHAPES, layers=1, experts=4, hidden=64, intermediate=64, top_k=2)
    make_checkpoint(tmp_path / "raw", shapes)
    with pytest.raises(CheckpointError, match=r"expected .*layers=2.* found .*layers=1"):
        make_checkpoint(tmp_path / "raw", replace(shapes, layers=2))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_recorded_trace_of_the_reference_model(tmp_path: Path) -> None:
    """26 layers of 64 experts, six a token: a synthetic model of fewer layers follows the first."""
    trace = tmp_path / "recorded.npz"
    profile = ["profile", "builtin:wordmath", "--task", "wordmath", "--read", "references"]
    profile += ["--limit", "2", "-o", str(tmp_path / "p.json"), "--trace", str(trace)]
    assert main([*profile, "-q"]) == 0
    shapes = replace(SHAPES, layers=3, experts=64, hidden=64, intermediate=64, top_k=6)
    settings = OffloadSettings(
        shapes=shapes, budgets=(0.3, 1.0), tiers=("disk",), peers=(), trace=trace,
        prompt=8, warm=4, tokens=6,
    )  # fmt: skip
    report = run(settings, tmp_path)
    recorded, followed = load_trace(trace), load_trace(tmp_path / "trace.npz")
    assert len(recorded.layers) == 26
    assert len(followed.layers) == 3
    assert report.settings["trace"] == str(trace)
    assert [found["budget"] for found in report.policies] == [0.3]
    for found in report.rows:
        assert "error" not in found
        assert found["stats"]["tokens"] == 6
    # The loads of a cache that everything fits into: the experts that are new in these tokens.
    everything = row_of(report, "raw, disk", 1.0)["stats"]
    seen, new = 12 + 8, 0
    for entry in followed.layers:
        before = set(entry.index[:seen].ravel().tolist())
        new += len(set(entry.index[seen : seen + 6].ravel().tolist()) - before)
    assert everything["loads"] == new


def test_traces_that_do_not_fit() -> None:
    batch = ZipfTrace(layers=2, experts=8, top_k=2, tokens=12, sequences=3, prompt=4).draw()
    fitted = fit_trace(batch, layers=5, experts=16, top_k=1)
    assert [entry.index.shape for entry in fitted.layers] == [(batch.n_tokens, 1)] * 5
    assert (np.diff(fitted.sequence) >= 0).all()
    with pytest.raises(CacheError, match="2 of 8 experts a token, the model has 3 of 8"):
        fit_trace(batch, layers=2, experts=8, top_k=3)
    with pytest.raises(CacheError, match="2 of 8 experts a token, the model has 2 of 4"):
        fit_trace(batch, layers=2, experts=4, top_k=2)
    batch.layers[1].index[3, 1] = -1
    with pytest.raises(CacheError, match="layer 2: some tokens have less than 2"):
        fit_trace(batch, layers=2, experts=8, top_k=2)


@pytest.mark.slow
def test_a_model_reads_real_prompts_with_its_own_routing(tmp_path: Path) -> None:
    settings = OffloadSettings(
        model="builtin:wordmath-mixtral",
        routing=("own",),
        budgets=(0.5,),
        tiers=("disk",),
        prompt=24,
        warm=4,
        tokens=6,
        peers=("stock",),
    )
    report = run(settings, tmp_path)
    raw, stock = row(report, "raw, disk, own routing"), row(report, "stock, own routing")
    assert raw["logits_sum"] == pytest.approx(stock["logits_sum"], rel=0.05, abs=1.0)
    assert report.policies == []
    assert "shapes" not in report.settings
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:wordmath-mixtral"))
    (problem,) = get_task("wordmath").problems(1)
    said = str(tokenizer.decode(np.load(tmp_path / "ids.npy"), skip_special_tokens=True))
    assert "".join(problem.prompt.split())[:40] in "".join(said.split())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peers": ("ollama",)}, "peers: expected some of stock, accelerate, llama.cpp, found"),
        ({"linears": ("auto",)}, "linears: expected some of values, codes, codes4, found"),
        ({"routing": ("random",)}, "routing: expected some of forced, own, found"),
        ({"routing": ()}, "routing: .* found none"),
        ({"routing": ("own",), "trace": Path("t.npz")}, r"trace t.npz: followed by forced routing"),
        ({"peers": ("llama.cpp",), "device": "cuda"}, "llama.cpp: is run on the CPU"),
    ],
)
def test_settings_that_do_not_go_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeboundError, match=message):
        OffloadSettings(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory-limit", "20%"], "--memory-limit '20%': expected a size"),
        (["--memory-limit", "0"], "--memory-limit '0': expected a size"),
        (["--model", "builtin:wordmath", "--layers", "2"], "--layers is of the synthetic"),
        (["--task", "wordmath"], "--task is what --model reads"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "offload", "--work", str(tmp_path / "work"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


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
