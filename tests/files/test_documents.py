"""Documents: what they say they are, and clear words for what is wrong with their fields."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from moebound.errors import FormatError, MoeboundError, PlanError, StoreError
from moebound.files.documents import (
    Format,
    count,
    fields_of,
    items,
    load_json,
    number,
    numbers,
    save_json,
)

FORM = Format("moebound.test", 2, PlanError)


def test_a_document_comes_back_with_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_json(path, {**FORM.header, "model": "m", "more": [1]})
    found = FORM.read(path)
    assert found.content == load_json(path) == {**FORM.header, "model": "m", "more": [1]}
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.describe() == {"file": "x.json", "sha256": found.sha256, "model": "m"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(StoreError, match="nowhere"):
        save_json(tmp_path / "nowhere" / "x.json", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected format 'moebound.test', found 'list'"),
        ('{"format": 3}', "found 3"),
        *(
            (json.dumps({"format": "moebound.test", "version": version}), "reads up to 2")
            for version in (0, 3, True, "1", None)
        ),
    ],
)
def test_something_else_raises_the_formats_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"x\.json: ") as caught:
        FORM.read(path)
    assert message in str(caught.value)


def test_earlier_versions_are_read_and_no_file_is_named(tmp_path: Path) -> None:
    FORM.check({"format": "moebound.test", "version": 1}, "x")
    with pytest.raises(PlanError, match=r"none\.json: cannot be read"):
        FORM.read(tmp_path / "none.json")
    with pytest.raises(MoeboundError, match=r"none\.json: cannot be read"):
        load_json(tmp_path / "none.json")


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, 8])
def test_what_is_no_count(value: Any) -> None:
    assert count(7, "n", most=7) == 7
    with pytest.raises(FormatError, match="n: expected a whole number from 0 to 7, found"):
        count(value, "n", most=7)


@pytest.mark.parametrize("value", [-0.1, True, "1", None, float("nan"), float("inf")])
def test_what_is_no_number(value: Any) -> None:
    assert number(3, "x") == 3.0
    assert number(-3, "x", least=None) == -3.0
    with pytest.raises(FormatError, match="x: expected"):
        number(value, "x")


def test_lists() -> None:
    assert numbers([1, 2.5], "x", n=2) == (1.0, 2.5)
    for value in ([], [1], 3, None, {"a": 1}):
        with pytest.raises(FormatError, match="x: expected 2 numbers"):
            numbers(value, "x", n=2)
    with pytest.raises(FormatError, match="x: expected a list of numbers"):
        numbers([], "x")
    with pytest.raises(FormatError, match="x: expected a list, found dict"):
        items({}, "x")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda data: data["b"], "f: 'b' is missing"),
        (lambda data: data["a"].items(), "f: 'int' object has no"),
        (lambda data: number(data["huge"], "a"), "f: "),
        (lambda data: numbers(data["a"], "a"), "f: a: expected a list"),
    ],
)
def test_whatever_is_wrong_with_a_field_names_the_file(read: Any, message: str) -> None:
    for error in (FormatError, PlanError):
        with pytest.raises(error, match=message), fields_of("f", error):
            read({"a": 1, "huge": 10**400})
