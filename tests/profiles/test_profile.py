"""Profiles: tasks apart and together, on disk and back, and as what selectors ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drawn_trace import drawn_trace
from moebound.errors import FormatError, MoeboundError, StoreError
from moebound.profile.balance import balance
from moebound.profile.profile import Profile, TaskUse, balance_of, combine
from moebound.sensitivity.selectors import parse_selector
from moebound.types import ExpertKey


def task(name: str = "one", seed: int = 0, **options: Any) -> TaskUse:
    return TaskUse.of(drawn_trace(seed=seed, **options), task=name, text="answers")


@pytest.fixture
def profile() -> Profile:
    return Profile("builtin:none", (task(), task("two", 1, n_tokens=25)))


def test_to_disk_and_back(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    again = Profile.load(tmp_path / "profile.json")
    assert again.to_json() == profile.to_json()
    assert [t.n_decoded for t in again.tasks] == [t.n_decoded for t in profile.tasks]
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_what_others_read(profile: Profile) -> None:
    """The form that the planner relies on."""
    document = json.loads(json.dumps(profile.to_json(), allow_nan=False))
    assert document["format"] == "moebound.profile"
    assert document["version"] == 1
    assert [layer["layer"] for layer in document["layers"]] == [1, 2, 5]
    for place, layer in enumerate(document["layers"]):
        parts = [t["layers"][place] for t in document["tasks"]]
        assert layer["counts"] == np.sum([p["counts"] for p in parts], axis=0).tolist()
        assert layer["weight_sums"] == pytest.approx(np.sum([p["weight_sums"] for p in parts], 0))
        assert layer["n_tokens"] == 65
        assert layer["balance"] == balance(layer["counts"]).to_json()


def test_rankings_by_all_tasks_and_by_one(profile: Profile) -> None:
    for layer in (1, 2, 5):
        counts = profile.layer(layer).counts
        assert list(profile.ranking(layer)) == sorted(range(8), key=lambda e: (-counts[e], e))
        only = profile.only("two").layer(layer)
        assert profile.only("two").ranking(layer) == only.ranking
        assert only.n_tokens == 25
    with pytest.raises(MoeboundError, match=r"'three' is not in the profile .*; it has one, two"):
        profile.only("three")


def test_selectors_take_it(profile: Profile) -> None:
    experts = [ExpertKey(layer, expert) for layer in (1, 2, 5) for expert in range(8)]
    group = parse_selector("group:1-5").resolve(experts, profile)
    assert group == tuple(ExpertKey(layer, profile.ranking(layer)[0]) for layer in (1, 2, 5))
    [least] = parse_selector("least-used:2").resolve(experts, profile)
    assert profile.layer(2).counts[least.expert] == profile.layer(2).counts.min()


def test_a_layer_that_the_profile_has_not(profile: Profile) -> None:
    experts = [ExpertKey(3, 0)]
    with pytest.raises(MoeboundError, match=r"layer 3 is not in the profile .*experts: 1, 2, 5"):
        parse_selector("most-used:3").resolve(experts, profile)


def test_combine() -> None:
    one, two = Profile("m", (task("a"),)), Profile("m", (task("b", 1), task("a", 2)))
    both = combine([one, two])
    assert [t.task for t in both.tasks] == ["a", "b"]
    assert both.tasks[0].n_tokens == 80
    np.testing.assert_array_equal(both.layer(2).counts, one.layer(2).counts + two.layer(2).counts)
    with pytest.raises(MoeboundError, match="of m and of other"):
        combine([one, Profile("other", (task(),))])
    with pytest.raises(MoeboundError, match="different models"):
        combine([one, Profile("m", (task("a", layers=(1, 2)),))])
    with pytest.raises(MoeboundError, match="no profiles"):
        combine([])


def test_a_task_comes_once() -> None:
    with pytest.raises(MoeboundError, match="each once"):
        Profile("m", (task(), task()))
    with pytest.raises(MoeboundError, match="each once"):
        Profile("m", ())
    other = TaskUse.of(drawn_trace(), task="one", text="references")
    with pytest.raises(MoeboundError, match="not counted together"):
        _ = task() + other


def test_no_tokens_no_balance() -> None:
    layer = task(n_tokens=1).layers[0]
    assert balance_of(layer) is not None
    assert balance_of(replace(layer, counts=0 * layer.counts)) is None


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_text("[" * 100_000),
        edited(lambda d: d.update(format="moebound.plan")),
        edited(lambda d: d.update(version=2)),
        edited(lambda d: d.pop("tasks")),
        edited(lambda d: d.update(tasks=[])),
        edited(lambda d: d.update(tasks=3)),
        edited(lambda d: d["tasks"][0].pop("text")),
        edited(lambda d: d["tasks"][0]["layers"][1]["counts"].pop()),
        edited(lambda d: d["tasks"][0]["layers"][1]["counts"].__setitem__(0, -4)),
        edited(lambda d: d["tasks"][0]["layers"][1]["counts"].__setitem__(0, 1.5)),
        edited(lambda d: d["tasks"][0]["layers"][1]["counts"].__setitem__(0, "1")),
        edited(lambda d: d["tasks"][0]["layers"][1]["weight_sums"].__setitem__(0, float("inf"))),
        edited(lambda d: d["tasks"][0]["layers"][1]["weight_sums"].append(0.0)),
        edited(lambda d: d["tasks"][0]["layers"][1].update(histogram=[[1]])),
        edited(lambda d: d["tasks"][0]["layers"][1]["histogram"][0].__setitem__(3, 99)),
    ],
)
def test_damaged(profile: Profile, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    damage(path)
    with pytest.raises(FormatError, match=r"profile\.json"):
        Profile.load(path)


def test_files_that_cannot_be_read_or_written(profile: Profile, tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="No such file"):
        Profile.load(tmp_path / "nowhere.json")
    with pytest.raises(StoreError, match="nowhere"):
        profile.save(tmp_path / "nowhere" / "profile.json")
