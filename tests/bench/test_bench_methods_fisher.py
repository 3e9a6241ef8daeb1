"""plan:fisher beside the others: planned for the size, by statistics of its own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moebound.bench.methods import run
from moebound.bench.methods.page import render
from moebound.bench.methods.parts import parts
from moebound.bench.methods.place import Place
from moebound.bench.methods.plots import KINDS, kind_of
from moebound.bench.methods.sizing import sizing_of
from moebound.calibrate import Settings, collect, of_task
from moebound.checkpoint import Expert, open_checkpoint
from moebound.cli.main import main
from moebound.errors import MethodError, MoeboundError, SizeError
from moebound.evaluate.loading import load
from moebound.files.formats.statistics import Statistics
from moebound.plan import Plan
from moebound.store import sizes
from moebound.tasks import get_task
from moebound.types import ExpertKey
from moebound.wordmath.builtin import MODELS
from untrained import untrained

OF = "the whole model"
WEIGHTED = f"{OF}, weighted by what the loss feels (--fisher)"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(untrained(tmp_path_factory.mktemp("model"), MODELS[0]))


@pytest.fixture(scope="module")
def both(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Statistics, Statistics]:
    """Plain statistics, and those of --fisher."""
    loaded, folder = load(source), tmp_path_factory.mktemp("statistics")
    text = of_task(loaded, get_task("wordmath"), 4, skip=500)
    return (
        collect(loaded, text, folder / "plain"),
        collect(loaded, text, folder / "fisher", Settings(fisher=True)),
    )


@pytest.mark.slow
def test_a_kept_run_goes_on_with_the_plan_as_one_more(
    source: str, both: tuple[Statistics, Statistics], tmp_path: Path
) -> None:
    plain, fisher = both
    options: dict[str, Any] = {"calibration": plain, "bits": [3.0], "limit": 2, "answers": 1}
    task, work = get_task("wordmath"), tmp_path / "work"
    run(source, task, methods=["calibrated"], rows=work, **options)
    about, kept = (work / "rows.json").read_text(), (work / "rows.jsonl").read_text()
    assert "fisher" not in about

    methods = ["plan:fisher", "calibrated"]
    report = run(source, task, methods=methods, rows=work, fisher=fisher, **options)
    planned, calibrated = report.rows
    assert (work / "rows.jsonl").read_text().startswith(kept)
    assert json.loads((work / "rows.json").read_text()).items() > json.loads(about).items()
    assert planned.made is not None
    assert calibrated.made is not None
    assert planned.made.setting == "calibrated, plan:fisher"
    assert planned.made.bits_per_weight == pytest.approx(3, rel=0.01)
    assert (planned.made.statistics, calibrated.made.statistics) == (WEIGHTED, OF)
    assert planned.made.guarantee == "max_abs"
    assert report.to_json()["fisher"] == fisher.of.to_json()
    assert "weighted by what the loss feels" in render(report)

    # Without them it is the run that it was; other Fisher statistics are another run's.
    again = run(source, task, methods=["calibrated"], rows=work, **options)
    assert again.rows == (calibrated,)
    text = of_task(load(source), task, 3, skip=500)
    other = collect(load(source), text, tmp_path / "other", Settings(fisher=True))
    with pytest.raises(MoeboundError, match="another fisher"):
        run(source, task, methods=methods, rows=work, fisher=other, **options)


@pytest.mark.slow
def test_a_candidate_is_the_plan_of_the_command(
    source: str,
    both: tuple[Statistics, Statistics],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, fisher = both
    rounded, times = sizes._rounded, Counter[tuple[ExpertKey, float]]()

    def counted(checkpoint: Any, expert: Expert, *given: Any) -> sizes.Rounded:
        times[expert.key, given[-1]] += 1
        return rounded(checkpoint, expert, *given)

    monkeypatch.setattr(sizes, "_rounded", counted)
    search = sizing_of("plan:fisher", Place(open_checkpoint(source), None, fisher)).search(3.0)
    first, second = search(3.0), search(3.2)
    assert set(times.values()) == {1}  # each expert once at a rate, for all sizes
    monkeypatch.undo()
    assert first.calibration == fisher.folder
    out = tmp_path / "plan.json"
    told = ["--calibration", str(fisher.folder), "--bpw", "3", "--no-measure", "-o", str(out)]
    assert main(["plan", source, *told]) == 0
    assert first.plan is not None
    assert second.plan is not None
    assert Path(first.plan).read_bytes() == out.read_bytes()
    assert Plan.load(Path(second.plan)).bits_per_weight == pytest.approx(3.2, rel=0.01)
    with pytest.raises(SizeError):
        sizing_of("plan:fisher", Place(open_checkpoint(source), None, fisher)).search(40.0)


def test_a_worker_has_them_too(
    source: str, both: tuple[Statistics, Statistics], tmp_path: Path
) -> None:
    loaded = load(source)
    made = parts(
        source, get_task("wordmath"), limit=1, answers=None, calibration=None,
        fisher=both[1].folder, moved=tmp_path, weights=loaded.source.weights, at=Path.cwd(),
        threads=None,
    )  # fmt: skip
    assert made._place.fisher is not None
    assert made._place.fisher.of == both[1].of


def test_it_wants_statistics_of_fisher(source: str, both: tuple[Statistics, Statistics]) -> None:
    with pytest.raises(MethodError, match="--fisher"):
        run(source, get_task("wordmath"), methods=["plan:fisher"], calibration=both[1], limit=1)
    with pytest.raises(MoeboundError, match="not weighted by what the loss feels"):
        run(source, get_task("wordmath"), methods=["bound"], fisher=both[0], limit=1)
    assert kind_of("plan:fisher") in KINDS
