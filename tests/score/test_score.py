"""A Score goes through JSON unchanged; what is no number and what was not measured stay apart."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from moebound.errors import FormatError
from moebound.score import KL, TABLE, Score, Tally, kl_lines

FULL = Score(
    0.02, 0.001, 3e-4, 5e-5, 0.98, 0.999, 7, 8, 400, 150, False, Tally(8, 6, 7, 8, 0), 1, 0
)  # fmt: skip


def test_json_and_back() -> None:
    for score in (FULL, Score(), Score(answer_kl_nats=0.1, answer_kl_stderr=0.01)):
        data = json.loads(json.dumps(score.to_json(), allow_nan=False))
        assert Score.from_json(data).to_json() == score.to_json()
    assert Score.from_json(FULL.to_json()) == FULL


def test_what_was_not_measured_is_equal() -> None:
    assert Score(answer_kl_nats=0.1) == Score(answer_kl_nats=0.1)
    assert Score() != Score(kl_nats=1.0)
    assert hash(FULL) == hash(Score.from_json(FULL.to_json()))


def test_infinitely_far_is_null_and_not_measured_is_absent() -> None:
    data = Score(math.inf, math.nan).to_json()
    assert data == {"kl_nats": None, "kl_stderr": None, "exact": True}
    again = Score.from_json(data)
    assert again.kl_nats == math.inf
    assert math.isnan(again.kl_stderr)
    assert math.isnan(again.answer_kl_nats)
    assert [text for _, text in kl_lines(again)] == ["inf ± nan"]
    assert kl_lines(Score()) == []


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "an object"),
        ({"kl_nats": "x"}, "kl_nats"),
        ({"kl_nats": -1}, "kl_nats"),
        ({"n_problems": 1.5}, "n_problems"),
        ({"n_problems": True}, "n_problems"),
        ({"exact": 1}, "exact"),
        ({"tally": 3}, "tally"),
        ({"tally": {"n": 3}}, "ica"),
    ],
)
def test_wrong_fields_are_named(data: Any, named: str) -> None:
    with pytest.raises(FormatError, match=named):
        Score.from_json(data)


def test_every_figure_has_a_text_and_none_where_it_was_not_measured() -> None:
    texts = {field.title: field.text(FULL) for field in TABLE}
    assert texts == {
        "KL, answers": "0.0003 ± 5e-05",
        "KL, all text": "0.02 ± 0.001",
        "same top token": "99.90 %",
        "ICA": "75.0 (40.9-92.9)",
        "PIA": "87.5 (52.9-97.8)",
        "p": "1",
    }
    assert {field.text(Score()) for field in TABLE} == {""}
    assert KL[0].text(FULL, (".5f", ".5f")) == "0.00030 ± 0.00005"
    down = Score(tally=Tally(100, 3, 3, 3, 97))
    assert [field.text(down) for field in TABLE if field.name in ("ica", "pia")] == ["/", "/"]


def test_a_kl_of_the_solutions_never_stands_alone() -> None:
    assert [field.name for field in TABLE[:2]] == ["answer_kl_nats", "kl_nats"]
    assert [field.name for field, _ in kl_lines(FULL)] == [field.name for field in TABLE[:2]]
