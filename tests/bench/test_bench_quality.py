"""The comparison at equal bytes, on a tiny model: sizes are equal, promises are kept."""

from __future__ import annotations

import pytest

from moebound.bench.quality import run
from moebound.bench.quality_table import render_quality
from moebound.errors import MoeboundError
from moebound.tasks import get_task


def test_bounded_ways_get_the_bytes_of_the_quantizer_and_no_more() -> None:
    said: list[str] = []
    report = run(
        "builtin:wordmath",
        get_task("wordmath"),
        quantizers=["rtn:int4:g64"],
        limit=4,
        say=lambda what, done, total: said.append(f"{what} {done}/{total}"),
    )
    quantizer, bound, sz3 = report.rows
    assert [row.method for row in report.rows] == ["rtn:int4:g64", "bound", "sz3"]
    assert quantizer.bits_per_weight == pytest.approx(4 + 20 / 64)
    for row in (bound, sz3):
        assert 0.97 < row.n_bytes / quantizer.n_bytes <= 1
    # The better coder keeps the narrower bound.
    assert (bound.largest_rate or 9) < (sz3.largest_rate or 0)
    assert bound.fidelity.answer_kl_nats < 1
    assert said[-1].endswith("2/3")
    assert render_quality(report).row_count == 4
    assert report.to_json()["rows"][1]["to_original"]["pia"]["n"] == 4


def test_an_unknown_quantizer_is_found_before_any_work() -> None:
    with pytest.raises(MoeboundError, match="rtn:int99:g64"):
        run("builtin:nothing", get_task("wordmath"), quantizers=["rtn:int99:g64"])
