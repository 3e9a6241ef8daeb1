"""Suites: the paper's places on models of any depth, stable ids, files with clear errors."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.errors import FormatError, MoeboundError
from moebound.files.formats.study import Condition
from moebound.paper.report.paper import TABLES as PAPER
from moebound.paper.study.suite import ModelFacts, whole_layer
from moebound.paper.study.suite_file import get_suite
from moebound.sensitivity.noise import source_ids
from moebound.sensitivity.selectors import parse_selector
from moebound.types import ExpertKey

TASKS = ("easy", "hard")
MOONLIGHT = ModelFacts("moonlight", "", tuple(range(1, 27)), 64, 6)


@lru_cache
def paper() -> list[Condition]:
    return get_suite("paper").conditions(MOONLIGHT, TASKS, n_seeds=1)


def paper_rows(name: str, source: str) -> list[Condition]:
    return [c for c in paper() if c.table == name and c.source == source]


def test_the_paper_suite_is_the_papers() -> None:
    """Against the report's own copy of the paper's tables. Table 4's first line is Table 3's."""
    for table in PAPER:
        asked = {(c.rate, c.paper) for c in paper_rows(table.id, "gaussian-sd")}
        if table.id == "3.2.1":
            assert {rate for rate, _ in asked} == {0.1, 0.3, 0.5, 0.8}
            continue
        listed = {
            (row.rate, (row.ica, row.pia))
            for row in table.rows
            if row.rate is not None and not (table.id == "4" and row.depth == 0)
        }
        assert asked == listed, table.id
        task = TASKS[table.task]
        assert {c.task for c in paper_rows(table.id, "gaussian-sd")} == {task}


def test_the_papers_places_on_its_own_model() -> None:
    selectors = {table: [c.selector for c in paper_rows(table, "codec:bound")] for table in "34678"}
    assert set(selectors["3"]) == {"most-used:1"}
    assert selectors["4"] == ["most-used:13", "most-used:20", "most-used:26"]
    assert selectors["6"] == ["layer:1", "layer:13", "layer:20", "layer:26"]
    assert set(selectors["7"]) == {"group:1-10", "group:9-18", "group:17-26"}
    assert [c.selector for c in paper_rows("5", "uniform")] == ["top:6:1", "top:6:26"]
    assert [c.selector for c in paper_rows("3.2.1", "randomise")] == ["expert:1:0"]


def test_every_source_stands_beside_the_others() -> None:
    of_table_7 = Counter(c.source for c in paper() if c.table == "7")
    assert set(of_table_7.values()) == {9}
    lossless = {"randomise", "codec:raw", "codec:lossless"}
    assert set(of_table_7) == set(source_ids()) - lossless


@pytest.mark.parametrize("name", ["paper", "quick"])
def test_every_layer_has_a_curve_for_plans(name: str) -> None:
    conditions = get_suite(name).conditions(MOONLIGHT, TASKS[:1])
    rates: dict[int, set[float | None]] = {}
    for c in conditions:
        layer = whole_layer(c.selector)
        if layer is not None and c.source == "codec:bound":
            rates.setdefault(layer, set()).add(c.rate)
    assert rates.keys() == set(MOONLIGHT.layers)
    assert all(len(found) >= 2 for found in rates.values())


@settings(max_examples=12)
@given(
    layers=st.sets(st.integers(0, 60), min_size=1, max_size=30),
    n_experts=st.integers(1, 9),
    name=st.sampled_from(["paper", "quick"]),
)
def test_suites_fit_every_model(layers: set[int], n_experts: int, name: str) -> None:
    """Places exist, ids are unique, baselines come first, whatever the model is like."""
    facts = ModelFacts("m", "", tuple(sorted(layers)), n_experts, min(2, n_experts))
    conditions = get_suite(name).conditions(facts, TASKS, sources=["gaussian-sd", "codec:bound"])
    ids = [condition.id for condition in conditions]
    assert len(set(ids)) == len(ids)
    assert [c.source for c in conditions[:3]].count("none") == 2
    keys = [ExpertKey(layer, e) for layer in facts.layers for e in range(n_experts)]
    for text in {condition.selector for condition in conditions[2:]}:
        selector = parse_selector(text)
        assert selector.needs_profile or selector.resolve(keys)
    for condition in conditions:
        assert Condition.from_json(json.loads(json.dumps(condition.to_json()))) == condition
    again = get_suite(name).conditions(facts, TASKS, sources=["gaussian-sd", "codec:bound"])
    assert again == conditions


def test_more_seeds_keep_the_ids_there_were() -> None:
    suite = get_suite("paper")
    few = {c.id for c in paper()}
    many = {c.id for c in suite.conditions(MOONLIGHT, TASKS, n_seeds=3)}
    assert few < many
    assert not any("codec:" in name and name.endswith("/1") for name in many)


def test_a_study_that_is_stopped_has_all_tables_once() -> None:
    """Seed by seed, not table by table."""
    seeds = [c.seed for c in get_suite("paper").conditions(MOONLIGHT, TASKS) if c.answers]
    assert seeds == sorted(seeds)


def test_quick_has_two_seeds_of_every_draw() -> None:
    """The first of them answered in some places, the others read for their KL."""
    seeds: dict[tuple[Any, ...], set[int]] = {}
    for c in get_suite("quick").conditions(MOONLIGHT, TASKS):
        if c.source not in ("none", "codec:bound"):
            seeds.setdefault((c.table, c.selector, c.source, c.rate), set()).add(c.seed)
            assert not (c.answers and c.seed)
    assert set(map(frozenset, seeds.values())) == {frozenset({0, 1})}


# Files


def written(tmp_path: Path, **content: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    return str(path)


GOOD: dict[str, Any] = {"selector": "layer:@1", "rate": [0.3, 0.8], "source": "uniform"}


def test_a_file_gives_what_it_says(tmp_path: Path) -> None:
    text = written(
        tmp_path, problems=7, read=3, seeds=2,
        conditions=[GOOD, {"selector": "1.0,2.3", "source": "randomise", "task": "hard"}],
    )  # fmt: skip
    suite = get_suite(text)
    assert (suite.name, suite.n_problems, suite.n_read) == ("mine", 7, 3)
    found = suite.conditions(MOONLIGHT, TASKS)
    assert len(found) == 2 + 2 * 2 * 2 + 2
    assert {c.selector for c in found if c.source == "uniform"} == {"layer:26"}
    assert {c.task for c in found if c.source == "randomise"} == {"hard"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"selector": "layr:1"}, r"conditions\[1\]: selector: .*layr"),
        ({"selector": "layer:99"}, r"conditions\[1\]: selector: layer 99 has no experts"),
        ({"selector": "layer:@1.5"}, r"conditions\[1\]: selector: .*depth"),
        ({"selector": "expert:@0:64"}, r"conditions\[1\]: selector: .*no expert 64"),
        ({"rate": -1}, r"conditions\[1\]: rate: .*above 0"),
        ({"rate": "0.3"}, r"conditions\[1\]: rate: .*number"),
        ({"rate": []}, r"conditions\[1\]: rate: expected a list with at least one"),
        ({"source": "gauss"}, r"conditions\[1\]: source: .*'gauss': unknown"),
        ({"source": "codec:sz9"}, r"conditions\[1\]: source: .*sz9"),
        ({"seeds": 0}, r"conditions\[1\]: seeds: expected a whole number from 1"),
        ({"answers": "yes"}, r"conditions\[1\]: answers: expected true or false"),
        ({"table": "10"}, r"conditions\[1\]: table: expected one of"),
        ({"scope": "model"}, r"conditions\[1\]: scope: expected one of"),
        ({"task": 2}, r"conditions\[1\]: task: "),
        ({"task": "other"}, r"conditions\[1\]: task: 'other' is not among the study's"),
        ({"paper": {"ica": 86}}, r"conditions\[1\]: paper: ica: expected a share"),
        ({"rates": 1}, r"conditions\[1\]: rates: no such field; there are selector"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    text = written(tmp_path, conditions=[GOOD, {**GOOD, **change}])
    with pytest.raises(MoeboundError, match=said):
        get_suite(text).conditions(MOONLIGHT, TASKS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "not JSON"),
        ("[]", "expected an object, found list"),
        ("{}", "conditions: expected a list"),
        ('{"conditions": []}', "conditions: expected a list"),
        ('{"conditions": [3]}', r"conditions\[0\]: expected an object, found int"),
        ('{"conditions": [{"rate": 1}]}', r"conditions\[0\]: selector: is missing"),
        ('{"conditions": [{"selector": "all"}]}', r"conditions\[0\]: rate: is missing"),
        ('{"problems": 0, "conditions": [{}]}', r"problems: expected a whole number from 1"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=rf"bad\.json: .*{said}|bad\.json: {said}"):
        get_suite(str(path)).conditions(MOONLIGHT, TASKS)


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(MoeboundError, match="expected paper, quick or a JSON file"):
        get_suite("papers")


def test_one_more_codec_keeps_the_conditions_there_were() -> None:
    """A study that was begun before a codec was added goes on."""
    suite = get_suite("paper")
    earlier = [source for source in suite.sources if source != "codec:cuszp"]
    assert len(earlier) < len(suite.sources)
    before = {c.id: c for c in suite.conditions(MOONLIGHT, TASKS, sources=earlier)}
    now = {c.id: c for c in suite.conditions(MOONLIGHT, TASKS)}
    assert before.items() < now.items()
