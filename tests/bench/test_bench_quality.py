"""The comparison at equal bytes, on a tiny model: sizes are equal, promises are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.bench.quality import run
from moebound.bench.quality_table import render_quality
from moebound.calibrate import collect, of_task
from moebound.errors import MoeboundError
from moebound.evaluate.loading import load
from moebound.tasks import get_task
from moebound.wordmath.builtin import MODELS
from untrained import untrained


@pytest.fixture(params=[MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def tiny_wordmath(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(untrained(tmp_path, request.param))


@pytest.mark.slow
def test_bounded_ways_get_the_bytes_of_the_quantizer_within_a_percent_or_two(
    tiny_wordmath: str,
) -> None:
    said: list[str] = []
    report = run(
        tiny_wordmath,
        get_task("wordmath"),
        quantizers=["rtn:int4:g64"],
        limit=4,
        say=lambda what, done, total: said.append(f"{what} {done}/{total}"),
    )
    quantizer, bound, sz3, cuszp = report.rows
    assert [row.method for row in report.rows] == ["rtn:int4:g64", "bound", "sz3", "cuszp"]
    # Real bytes: matrices of so few weights show the frame around each.
    assert quantizer.bits_per_weight == pytest.approx(4 + 20 / 64, abs=0.1)
    assert quantizer.bits_per_weight > 4 + 20 / 64
    for row in (bound, sz3, cuszp):
        assert row.n_bytes == pytest.approx(quantizer.n_bytes, rel=0.02)
    # The better coder keeps the narrower bound.
    assert (bound.largest_rate or 9) < (sz3.largest_rate or 0) < (cuszp.largest_rate or 0)
    assert bound.score.answer_kl_nats < 1
    assert said[-1].endswith("3/4")
    assert render_quality(report).row_count == 5
    assert report.to_json()["rows"][1]["to_original"]["pia"]["n"] == 4


def test_an_unknown_quantizer_is_found_before_any_work() -> None:
    with pytest.raises(MoeboundError, match="rtn:int99:g64"):
        run("builtin:nothing", get_task("wordmath"), quantizers=["rtn:int99:g64"])


@pytest.mark.slow
def test_calibrated_rows_have_the_bytes_of_the_quantizer_too(tmp_path: Path) -> None:
    source, task = str(untrained(tmp_path, MODELS[1])), get_task("wordmath")
    loaded = load(source)
    found = collect(loaded, of_task(loaded, task, 4, skip=500), tmp_path / "stats")
    report = run(source, task, quantizers=["rtn:int4:g64"], calibration=found, limit=4)
    quantizer, *_, calibrated = report.rows
    assert calibrated.method == "calibrated"
    assert calibrated.n_bytes == pytest.approx(quantizer.n_bytes, rel=0.01)
    assert calibrated.largest_rate is not None
    assert calibrated.max_abs_error > 0
