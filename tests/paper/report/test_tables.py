"""Tables: each line beside the paper's own, baselines, marks, and what is not there."""

from __future__ import annotations

import math

import pytest

from moebound.paper.report import Report, paper
from moebound.paper.report.tables import Table

from .conftest import Judge
from .synthetic import EASY, HARD, SOURCES


def table(report: Report, name: str) -> Table:
    return next(entry for entry in report.tables if entry.id == name)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("3", [(0.82, 0.96), (0.80, 0.96), (0.79, 0.95)]),
        ("4", [(0.79, 0.95), (0.75, 0.94), (0.89, 0.96), (0.96, 0.96)]),
        ("5", [(0.74, 0.90), (0.90, 0.93)]),
        ("6", [(0.33, 0.71), (0.38, 0.65), (0.61, 0.80), (0.85, 0.90)]),
        ("8", [(0.60, 0.65), (0.56, 0.60), (0.62, 0.68), (0.66, 0.70)]),
        ("9", [(0.60, 0.63), (0.58, 0.62), (0.63, 0.65),
               (0.50, 0.58), (0.43, 0.50), (0.56, 0.60)]),
    ],
)  # fmt: skip
def test_lines_stand_beside_the_papers(
    paperlike_report: Report, name: str, numbers: list[tuple[float, float]]
) -> None:
    found = [(line.paper.ica, line.paper.pia) for line in table(paperlike_report, name).lines
             if line.paper]  # fmt: skip
    assert found == numbers


def test_no_output_in_the_paper_and_here(paperlike_report: Report) -> None:
    lines = [line for line in table(paperlike_report, "7").lines if line.rate == 0.8]
    assert len(lines) == 3
    for line in lines:
        assert line.paper is not None
        assert line.paper.no_output
        assert line.measured["gaussian-sd"].silent
        assert not line.measured["codec:bound"].silent


def test_section_without_numbers_has_words(paperlike_report: Report) -> None:
    lines = table(paperlike_report, "3.2.1").lines
    assert [line.paper.note for line in lines if line.paper] == ["no effect"] * 4 + [
        "entirely incorrect"
    ]
    assert set(lines[-1].measured) == {"randomise"}


def test_baselines_and_columns(paperlike_report: Report) -> None:
    four, eight = table(paperlike_report, "4"), table(paperlike_report, "8")
    assert (four.task, eight.task) == (EASY, HARD)
    assert four.sources == SOURCES
    assert four.paper_baseline is not None
    assert (four.paper_baseline.ica, four.paper_baseline.pia) == (0.86, 0.96)
    assert four.baseline is not None
    assert four.baseline.n == 500
    assert four.baseline.pia.low < four.baseline.pia.share < four.baseline.pia.high


def test_cells_pool_seeds_and_mark_what_is_significant(paperlike_report: Report) -> None:
    line = table(paperlike_report, "6").lines[1]
    noise, real = line.measured["gaussian-sd"], line.measured["codec:bound"]
    assert (noise.seeds, real.seeds) == (3, 1)
    assert noise.pia.mark == "lower"
    assert noise.pia.difference is not None
    assert noise.pia.difference.value < -0.2
    mean, low, high = noise.figures["answer_kl_nats"]
    assert low < mean < high
    assert noise.to_json()["kl"] == (mean, low, high)  # its name in the first version
    assert real.bits_per_weight == pytest.approx(3.1)


def test_first_layer_measured_once_counts_in_both_tables(judge: Judge) -> None:
    report = judge(
        n=50, seeds=1, sources=("gaussian-sd",),
        keep=lambda place: place.table == "3" or (place.table == "4" and place.depth > 0),
    )  # fmt: skip
    assert [line.layers for line in table(report, "4").lines] == [(1,), (13,), (20,), (26,)]
    assert len(table(report, "3").lines) == 3


def test_conditions_that_are_only_read_have_kl_and_no_accuracy(paperlike_report: Report) -> None:
    cell = table(paperlike_report, "extra").lines[0].measured["codec:bound"]
    assert cell.n == 0
    assert math.isnan(cell.pia.share)
    assert cell.pia.difference is None
    assert "answer_kl_nats" in cell.figures


def test_the_papers_numbers() -> None:
    assert [t.id for t in paper.TABLES] == ["3.2.1", "3", "4", "5", "6", "7", "8", "9"]
    depths = [row.depth for row in paper.TABLES[2].rows if row.depth is not None]
    assert depths == [0.0, 0.48, 0.76, 1.0]
    seven = paper.table("7")
    assert seven is not None
    beside = seven.nearest(0.5, 0.5, randomised=False)
    assert beside is not None
    assert beside.label == "G2: L9-L18"
    assert seven.nearest(0.5, 0.4, randomised=False) is None
