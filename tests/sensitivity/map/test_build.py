"""Maps on disk: resumed after a kill, refused when they are of something else, read back whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.errors import FormatError, MoeboundError
from moebound.evaluate.calibration import calibration_of
from moebound.files.formats.sensitivity_map import SensitivityMap
from moebound.model import live_experts
from moebound.sensitivity.map.build import Build, Named
from moebound.sensitivity.map.rows import SUFFIX, Rows
from moebound.sensitivity.map.settings import MapSettings

from .texts import random_text, sure_model

SETTINGS = MapSettings((0.3, 0.8), n_probes=2, n_ties=3, n_sampled=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return sure_model("deepseek_v3", batched=True)


class Killed(BaseException):
    pass


def results(found: SensitivityMap) -> Any:
    """Without what is timed."""
    return found.experts, found.joint


def test_killed_after_any_step_it_goes_on(model: Any, tmp_path: Path) -> None:
    text, named = random_text(3), Named("m", "t")
    whole = Build(model, text, named, SETTINGS, tmp_path / "whole.json").run()
    assert SensitivityMap.load(tmp_path / "whole.json") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]
    path = tmp_path / "map.json"
    partial = tmp_path / f"map.json{SUFFIX}"
    kills = 0
    while not path.exists():
        build = Build(model, text, named, SETTINGS, path)
        assert len(build.rows.found) == kills
        append = build.rows.append

        def then_die(row: dict[str, Any], append: Callable[[Any], None] = append) -> None:
            append(row)
            raise Killed

        build.rows.append = then_die  # type: ignore[method-assign]
        try:
            build.run()
        except Killed:
            kills += 1
            # the power fails in the middle of a line
            with partial.open("ab") as file:
                file.write(b'{"kind": "layer", "pl')
    assert kills == 1 + len(live_experts(model).stacks) + len(SETTINGS.rates)
    assert results(SensitivityMap.load(path)) == results(whole)
    assert not partial.exists()


def test_layer_after_layer_where_memory_is_short(model: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    text, named = random_text(3), Named("m", "t")
    whole = Build(model, text, named, SETTINGS, tmp_path / "a").run()
    short = replace(SETTINGS, memory_bytes=1, batch_tokens=1)
    parts = Build(model, text, named, short, tmp_path / "b").run()
    for one, other in zip(whole.experts, parts.experts, strict=True):
        if one.measured_kl is not None:
            assert other.measured_kl == pytest.approx(one.measured_kl, rel=1e-3, abs=1e-9)
        assert one.n_bytes == other.n_bytes


def test_what_the_planner_reads(model: Any, tmp_path: Path) -> None:
    found = Build(model, random_text(3), Named("m", "t"), SETTINGS, tmp_path / "map.json").run()
    document = json.loads((tmp_path / "map.json").read_text())
    assert (document["format"], document["version"]) == ("moebound.sensitivity", 2)
    assert document["tokens"] == "answers"
    assert document["bounds"] == [0.3, 0.8]
    live = live_experts(model)
    assert [(e["layer"], e["expert"]) for e in document["experts"]] == [
        (key.layer, key.expert) for key in live
    ]
    assert sum(e["measured_kl"] is not None for e in document["experts"]) == 3
    for entry, expert in zip(document["experts"], live.values(), strict=True):
        weights = torch.cat([matrix.flatten() for matrix in expert.matrices.values()])
        assert entry["mean_abs"] == pytest.approx(float(weights.abs().mean()), rel=1e-5)
        assert entry["n_weights"] == expert.n_weights
        assert set(entry["by_role"]) == {"gate", "up", "down"}
        assert len(entry["predicted_kl"]) == 2
        for at in range(2):
            sizes = [role["bytes"][at] for role in entry["by_role"].values()]
            assert entry["bytes"][at] == sum(sizes)
    assert found.joint["measured_kl"][1] > found.joint["measured_kl"][0] > 0
    assert found.checks["n_sampled"] == 3


def test_a_map_of_all_tokens_reads_prompts(model: Any, tmp_path: Path) -> None:
    """The same text: every token that predicts one counts, or those before the solution do not."""
    answers, everything = random_text(3), random_text(3, tokens="all")
    assert answers.digest != everything.digest
    assert everything.n_positions == int(everything.attention_mask.sum()) > answers.n_positions
    maps = {
        text.tokens: Build(model, text, Named("m", "t"), SETTINGS, tmp_path / text.tokens).run()
        for text in (answers, everything)
    }
    assert {found.tokens for found in maps.values()} == {"answers", "all"}
    for tokens, found in maps.items():
        assert SensitivityMap.load(tmp_path / tokens) == found
        for score, kl in zip(found.joint["scores"], found.joint["measured_kl"], strict=True):
            assert kl == score["kl_nats" if tokens == "all" else "answer_kl_nats"]
    # The model is the same, and so is what all experts together do to it.
    assert [s["kl_nats"] for s in maps["all"].joint["scores"]] == pytest.approx(
        [s["kl_nats"] for s in maps["answers"].joint["scores"]]
    )
    lines = zip(maps["all"].experts, maps["answers"].experts, strict=True)
    assert any(a.predicted_kl[1] > 1.1 * b.predicted_kl[1] for a, b in lines)
    # Maps of before there was a choice are of answers.
    document = json.loads((tmp_path / "answers").read_text())
    del document["tokens"]
    assert SensitivityMap.from_json({**document, "version": 1}).tokens == "answers"


def test_rows_of_another_run_are_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    text = random_text(3)
    Build(model, text, Named("m", "t"), SETTINGS, path).rows.close()
    for other, settings in ((text, MapSettings((0.5,))), (random_text(4), SETTINGS)):
        with pytest.raises(MoeboundError, match="another run"):
            Build(model, other, Named("m", "t"), settings, path)
    with pytest.raises(MoeboundError, match="task differ"):
        Build(model, text, Named("m", "other"), SETTINGS, path)
    (tmp_path / f"map.json{SUFFIX}").write_bytes(b"what is this\n")
    with pytest.raises(MoeboundError, match="remove it to begin again"):
        Build(model, text, Named("m", "t"), SETTINGS, path)


def test_rows(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "x", {"a": 1})
    rows.append({"b": 2})
    rows.close()
    again = Rows(tmp_path / "x", {"a": 1})
    assert again.found == [{"b": 2}]
    again.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(format="moebound.plan"),
        lambda d: d.update(version=3),
        lambda d: d.update(tokens="some"),
        lambda d: d.pop("bounds"),
        lambda d: d.update(experts=3),
        lambda d: d["experts"][0].pop("layer"),
        lambda d: d["experts"][0].update(predicted_kl=["x"]),
        lambda d: d["experts"][0].update(by_role=[]),
    ],
)
def test_damaged(edit: Callable[[dict[str, Any]], Any]) -> None:
    line = {"layer": 1, "expert": 0, "mean_abs": 1.0, "n_weights": 1, "n_tokens": 1, "bytes": [1],
            "predicted_kl": [0.1], "flips_kl": [0.0], "measured_kl": None,
            "by_role": {}}  # fmt: skip
    document = {"format": "moebound.sensitivity", "version": 2, "model": "m", "task": "t",
                "tokens": "all", "skip": 24, "n_prompts": 1, "n_positions": 1, "codec": "bound",
                "bounds": [0.3], "experts": [line], "joint": {}, "checks": {}}  # fmt: skip
    assert SensitivityMap.from_json(document).to_json() == document
    earlier = {name: value for name, value in document.items() if name != "skip"}
    assert SensitivityMap.from_json(earlier).skip is None
    of_answers = {n: v for n, v in document.items() if n != "tokens"} | {"version": 1}
    assert SensitivityMap.from_json(of_answers).tokens == "answers"
    edit(document)
    with pytest.raises(FormatError):
        SensitivityMap.from_json(document)


def test_calibration() -> None:
    text = calibration_of([([5, 6, 7], [8, 9]), ([5], [6])])
    assert text.lengths == (1, 4)
    assert text.input_ids.tolist() == [[5, 0, 0, 0], [5, 6, 7, 8]]
    assert text.scored.tolist() == [[True, False, False, False], [False, False, True, True]]
    assert text.n_positions == 3
    assert [list(range(2))[rows] for rows in text.batches(1)] == [[0], [1]]
    assert [list(range(2))[rows] for rows in text.batches(8)] == [[0, 1]]
    empty: list[list[tuple[list[int], list[int]]]] = [[], [([], [1])], [([1], [])]]
    for bad in empty:
        with pytest.raises(MoeboundError):
            calibration_of(bad)


@pytest.mark.parametrize("bad", [{"rates": ()}, {"rates": (0.0,)}, {"rates": (0.5, 0.1)},
                                 {"measure": "most"}, {"n_probes": 0}, {"seed": -1}])  # fmt: skip
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(MoeboundError):
        MapSettings(**bad)


def test_without_ties_the_smooth_part_is_left(model: Any, tmp_path: Path) -> None:
    text, named = random_text(3), Named("m", "t")
    with_ties = Build(model, text, named, SETTINGS, tmp_path / "a.json").run()
    without = Build(model, text, named, replace(SETTINGS, n_ties=0), tmp_path / "b.json").run()
    assert any(kl > 0 for line in with_ties.experts for kl in line.flips_kl or ())
    for one, other in zip(with_ties.experts, without.experts, strict=True):
        assert other.flips_kl == (0.0, 0.0)
        smooth = [a - b for a, b in zip(one.predicted_kl, one.flips_kl or (), strict=True)]
        assert other.predicted_kl == pytest.approx(smooth, rel=1e-4, abs=1e-12)
