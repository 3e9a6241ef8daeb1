"""Verdict rules on studies whose effects are known: clear support, clear contradiction, open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moebound.paper.report import Report, make_report, read_study
from moebound.paper.report.claims import CLAIMS
from moebound.paper.report.compare import Difference
from moebound.paper.report.evidence import Evidence, balance, every, some
from moebound.profile.profile import Profile, TaskUse
from moebound.profile.usage import N_BINS, LayerUse
from moebound.types import Array

from .conftest import Judge
from .synthetic import LAYERS, Effect, Place, write_study

SUPPORTED = {
    "rare-expert-harmless", "randomised-expert-fatal", "used-expert-robust", "format-first",
    "non-monotonic", "middle-most-sensitive", "shallow-like-middle", "deep-errors-help",
    "errors-add-up", "layer-collapses", "groups-fall-silent", "groups-worse-than-one",
    "use-decides", "where-most-sensitive", "gaussian-power-predicts", "deep-gain-by-magnitude",
}  # fmt: skip
CONTRADICTED = {
    "rerouting", "error-is-normal", "gaussian-sd-predicts", "gaussian-var-predicts", "cascade",
}  # fmt: skip
OPPOSITE = {
    "randomised-expert-fatal", "middle-most-sensitive", "shallow-like-middle", "protect-early",
    "deep-errors-help", "layer-collapses", "groups-fall-silent", "where-most-sensitive",
    "generalises", "deep-gain-by-magnitude",
}  # fmt: skip
NEVER = {"overlap", "better-than-quantization"}


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_supported_where_the_effect_is_there(paperlike_report: Report, name: str) -> None:
    verdict = paperlike_report.verdict(name)
    assert verdict.outcome == "supports", verdict.finding


@pytest.mark.parametrize("name", sorted(CONTRADICTED))
def test_contradicted_where_it_is_not(paperlike_report: Report, name: str) -> None:
    verdict = paperlike_report.verdict(name)
    assert verdict.outcome == "contradicts", verdict.finding


@pytest.mark.parametrize("name", sorted(OPPOSITE))
def test_contradicted_where_the_effect_is_the_other_way(opposite_report: Report, name: str) -> None:
    verdict = opposite_report.verdict(name)
    assert verdict.outcome == "contradicts", verdict.finding


def test_noise_that_does_what_the_codec_does_predicts_it(opposite_report: Report) -> None:
    for name in ("gaussian-sd", "gaussian-var", "gaussian-power", "uniform"):
        verdict = opposite_report.verdict(f"{name}-predicts")
        assert verdict.outcome == "supports", verdict.finding


def test_few_problems_leave_accuracy_open(tiny_report: Report) -> None:
    for name in ("rare-expert-harmless", "used-expert-robust", "shallow-harmless",
                 "deep-errors-help", "deep-gain-by-magnitude", "format-first"):  # fmt: skip
        verdict = tiny_report.verdict(name)
        assert verdict.outcome == "open", verdict.finding


def test_the_real_codec_has_a_verdict_of_its_own(paperlike_report: Report) -> None:
    verdict = paperlike_report.verdict("groups-fall-silent")
    assert verdict.outcome == "supports"
    assert verdict.real is not None
    assert verdict.real.outcome == "contradicts"
    assert all("/" not in piece.text for piece in verdict.real.evidence)


def test_no_effect_anywhere_finds_none(judge: Judge) -> None:
    report = judge(n=600, seeds=2, sources=("gaussian-sd", "codec:bound"))
    assert report.verdict("deep-errors-help").outcome == "contradicts"
    assert report.verdict("rare-expert-harmless").outcome == "supports"
    assert report.verdict("shallow-harmless").outcome == "supports"
    assert report.verdict("format-first").outcome == "open"
    cells = [cell for t in report.tables for line in t.lines for cell in line.measured.values()]
    marks = {cell.ica.mark for cell in cells if cell.n and cell.source != "randomise"}
    assert marks == {"same"}


def test_chance_gains_do_not_count(judge: Judge) -> None:
    """20 of 500 answers change at random in every condition, many conditions are looked at."""

    def noise(place: Place, source: str) -> Effect:
        return Effect(pia=-0.3, ica=-0.1) if place.depth == 1 and place.table == "4" else Effect()

    # 0.3 of the 25 wrong ones: 7 or 8 gains of 500, p = 0.008 before the correction.
    report = judge(noise, seeds=1, sources=("gaussian-sd", "codec:bound"))
    deep = report.verdict("deep-errors-help")
    assert deep.outcome != "supports"
    assert any("+1." in piece.text for piece in deep.finding.evidence)


def test_without_a_codec_or_a_simulation_what_needs_them_is_open(judge: Judge) -> None:
    only = judge(sources=("gaussian-sd",), n=100, seeds=1, keep=lambda place: place.table == "3")
    assert only.suite.codec is None
    for name in ("gaussian-sd-predicts", "error-is-normal", "middle-most-sensitive"):
        assert only.verdict(name).outcome == "open"
        assert "Not measured" in only.verdict(name).finding.why
    assert only.verdict("used-expert-robust").real is None


def test_every_claim_has_a_rule_and_a_verdict(paperlike_report: Report) -> None:
    assert [v.claim for v in paperlike_report.verdicts] == list(CLAIMS)
    for verdict in paperlike_report.verdicts:
        assert verdict.claim.rule
        assert verdict.finding.why
        assert (verdict.outcome == "open") >= (verdict.claim.id in NEVER)


def test_the_correction_covers_the_suite(paperlike_report: Report) -> None:
    pia = [cell.pia.difference for table in paperlike_report.tables for line in table.lines
           for cell in line.measured.values() if cell.pia.difference]  # fmt: skip
    assert all(d.adjusted >= d.p for d in pia)
    smallest = min(pia, key=lambda d: d.p)
    assert smallest.adjusted <= smallest.p * paperlike_report.suite.n_comparisons * (1 + 1e-9)


def _evidence(*favours: str) -> list[Evidence]:
    return [Evidence("", f) for f in favours]  # type: ignore[arg-type]


def test_ways_to_weigh() -> None:
    assert every(_evidence("for", "for")) == "supports"
    assert every(_evidence("for", "neither")) == "open"
    assert every(_evidence("for", "against")) == "contradicts"
    assert some(_evidence("against", "for")) == "supports"
    assert some(_evidence("against", "against")) == "contradicts"
    assert some(_evidence("against", "neither")) == "open"
    assert balance(_evidence("neither", "for")) == "supports"
    assert balance(_evidence("for", "against")) == "open"
    assert {every([]), some([]), balance([])} == {"open"}


def test_significant_and_small_is_no_drop() -> None:
    small = Difference(-0.01, -0.015, -0.005, 1e-6, 5000, adjusted=1e-5)
    assert small.lower
    assert not small.drops
    assert small.within()


def profile(folder: Path, **used: Array) -> None:
    """A routing profile in a study's folder. used: task -> [E], the same in every layer."""
    tasks = []
    for task, found in used.items():
        n = int(found.sum())
        rng = np.random.default_rng(1)
        layers = []
        for layer in LAYERS:
            counts = found + rng.integers(0, 3, len(found))
            histogram = np.zeros((len(counts), N_BINS), np.int64)
            histogram[:, 30] = counts
            layers.append(LayerUse(layer, n // 6, counts, counts * 0.4, counts * 0.16, histogram))
        tasks.append(TaskUse(task.replace("_", "-"), "references", 10, n // 6, 0, tuple(layers)))
    Profile("builtin:wordmath", tuple(tasks)).save(folder / "profile.json")


@pytest.mark.parametrize(
    ("easy", "hard", "few", "more"),
    [
        (np.arange(64) ** 3, np.arange(64), "supports", "supports"),
        (np.full(64, 900), np.arange(64) * 30, "contradicts", "contradicts"),
    ],
)
def test_use_of_experts_comes_from_the_profile(
    tmp_path: Path, easy: Array, hard: Array, few: str, more: str
) -> None:
    folder = write_study(
        tmp_path / "s", n=20, seeds=1, sources=("gaussian-sd",),
        keep=lambda place: place.table == "3",
    )  # fmt: skip
    document = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(document | {"profile": "profile.json"}))
    profile(folder, wordmath=easy, wordmath_hard=hard)
    report = make_report(read_study(folder))
    assert report.verdict("few-experts-work").outcome == few
    assert report.verdict("harder-task-more-experts").outcome == more
    (folder / "profile.json").write_text("{")
    assert make_report(read_study(folder)).verdict("few-experts-work").outcome == "open"
