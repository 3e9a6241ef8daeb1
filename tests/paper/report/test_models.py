"""Several models side by side: what is put beside what, and whether a pattern holds in all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moebound.cli.main import main
from moebound.errors import MoeboundError
from moebound.paper.report import Report, compare_models, make_report, read_study
from moebound.paper.report.evidence import Outcome
from moebound.paper.report.models import Together, together
from moebound.paper.report.page_models import render_models

from .conftest import as_in_the_paper, upside_down
from .synthetic import write_study
from .test_page import HOSTILE, parsed

OTHER = "builtin:other"
FEW: dict[str, Any] = {"n": 30, "seeds": 1, "sources": ("gaussian-sd", "codec:bound")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("studies")
    sources = ("gaussian-sd", "codec:bound")
    return (
        write_study(at / "a", as_in_the_paper, sources=sources),
        write_study(at / "b", upside_down, sources=sources, model=OTHER, n_layers=8),
    )


@pytest.fixture(scope="module")
def reports(folders: tuple[Path, Path]) -> tuple[Report, ...]:
    return tuple(make_report(read_study(folder)) for folder in folders)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (("supports", "supports"), "all"),
        (("contradicts", "contradicts"), "none"),
        (("supports", "contradicts", "open"), "differ"),
        (("supports", "open"), "open"),
        (("contradicts", "open"), "open"),
        (("open", "open"), "open"),
    ],
)
def test_what_models_say_together(outcomes: tuple[Outcome, ...], expected: Together) -> None:
    assert together(outcomes) == expected


def test_verdicts_are_those_of_each_report(reports: tuple[Report, ...]) -> None:
    models = compare_models(reports)
    for entry in models.judged:
        own = [report.verdict(entry.claim.id) for report in reports]
        assert entry.outcomes == tuple(v.outcome for v in own)
        assert entry.real == tuple(v.real and v.real.outcome for v in own)


def test_one_model_that_contradicts_a_pattern_settles_it(reports: tuple[Report, ...]) -> None:
    models = compare_models(reports)
    middle = next(e for e in models.patterns if e.claim.id == "middle-most-sensitive")
    assert middle.outcomes == ("supports", "contradicts")
    assert models.generalises == "contradicts"


def test_effects_stand_at_the_same_place_of_the_paper(reports: tuple[Report, ...]) -> None:
    """26 layers beside 8: L13 of the paper is in the middle of both, and nobody's layer 13."""
    effects = compare_models(reports).effects
    assert {e.table for e in effects} == {"3.2.1", "3", "4", "5", "6", "7", "8", "9"}
    for effect in effects:
        first, second = effect.depths
        assert first is not None
        assert second is not None
        assert abs(first - second) < 0.1
    whole = next(e for e in effects if e.table == "6" and "L13" in e.where)
    for report, cell in zip(reports, whole.measured, strict=True):
        line = next(
            line for table in report.tables if table.id == "6" for line in table.lines
            if line.paper is not None and "L13" in line.paper.label
        )  # fmt: skip
        assert cell is line.measured[whole.source]


def test_eight_layers_are_enough_to_compare_by_depth(reports: tuple[Report, ...]) -> None:
    """Two of eight are the middle."""
    for entry in compare_models(reports).by_depth:
        paperlike, opposite = entry.contrasts
        assert paperlike is not None
        assert opposite is not None
        assert opposite.to_deep.value < 0 < paperlike.to_deep.value


def test_what_one_study_lacks_is_blank(tmp_path: Path, reports: tuple[Report, ...]) -> None:
    folder = write_study(tmp_path / "c", model="third", keep=lambda p: p.table != "6", **FEW)
    models = compare_models([reports[0], make_report(read_study(folder))])
    missing = [e for e in models.effects if e.table == "6"]
    assert missing
    for effect in missing:
        assert effect.measured[0] is not None
        assert effect.measured[1] is None
    parsed(render_models(models))


def test_a_study_alone_or_twice_is_refused(reports: tuple[Report, ...]) -> None:
    with pytest.raises(MoeboundError, match="two models or more, found 1"):
        compare_models(reports[:1])
    with pytest.raises(MoeboundError, match="2 of the studies are of builtin:wordmath"):
        compare_models([reports[0], reports[0]])


def test_another_number_of_tasks_is_refused(reports: tuple[Report, ...]) -> None:
    other = reports[1]
    fewer = replace(other, study=replace(other.study, tasks=other.study.tasks[:1]))
    with pytest.raises(MoeboundError, match="different numbers of tasks"):
        compare_models([reports[0], fewer])


def test_the_page_has_both_and_needs_nothing_else(reports: tuple[Report, ...]) -> None:
    page = render_models(compare_models(reports))
    found = parsed(page)
    text = " ".join(found.text)
    for entry in compare_models(reports).judged:
        assert entry.claim.text in text
    assert OTHER in text
    assert "No: at least one model contradicts" in text
    assert page.count('<svg class="plot"') == 1
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img"}


def test_hostile_names_are_text_here_too(tmp_path: Path, reports: tuple[Report, ...]) -> None:
    folder = write_study(tmp_path / "x", model=HOSTILE, label=lambda t: t + HOSTILE, **FEW)
    found = parsed(render_models(compare_models([make_report(read_study(folder)), reports[0]])))
    assert not {tag for tag, _ in found.tags} & {"script", "img"}
    assert any(HOSTILE in text for text in found.text)


def test_command_of_several(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "models.html"
    assert main(["report", *map(str, folders), "-o", str(page), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "moebound.models"
    assert [m["model"] for m in document["models"]] == ["builtin:wordmath", OTHER]
    assert [m["layers"] for m in document["models"]] == [26, 8]
    assert document["generalises"] == "contradicts"
    assert page.read_text().startswith("<!doctype html>")


def test_the_same_study_twice_ends_with_2(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folders[0]), str(folders[0])]) == 2
    assert "one of each model" in capsys.readouterr().err
    assert not (folders[0] / "models.html").exists()
