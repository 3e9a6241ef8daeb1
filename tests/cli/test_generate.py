"""`moebound generate`: options of sampling. tests/text has what they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run

QUESTION = (
    "Eli has 42 coins. Eli gives 17 coins to Ava. How many coins does Eli have left? "
    "Put the answer in a box."
)


@pytest.mark.parametrize(
    "options",
    [
        ["--top-k", "-1"], ["--min-p", "1.5"], ["--repetition-penalty", "0"],
        ["--presence-penalty", "3"], ["--frequency-penalty", "-3"], ["--logit-bias", "five"],
        ["--logit-bias", "5"], ["--logit-bias", "5=101"], ["--json-schema", "nowhere"],
    ],
)  # fmt: skip
def test_options_that_are_wrong(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("moebound.offload.loading.load", fail)
    ran = run("generate", "builtin:wordmath", "--prompt", "a", *options)
    assert ran.code == 2
    named = options[0].removeprefix("--")
    assert named in ran.stderr or named.replace("-", "_") in ran.stderr


def test_a_schema_that_is_no_json(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text("{")
    ran = run("generate", "builtin:wordmath", "--prompt", "a", "--json-schema", path)
    assert ran.code == 2
    assert str(path) in ran.stderr


def test_they_change_the_text(run: Run) -> None:
    def text(*options: str) -> str:
        ran = run("generate", "builtin:wordmath", "--prompt", QUESTION, "--chat",
                  "--ram-budget", "100%", "--json", *options)  # fmt: skip
        assert ran.code == 0, ran.stderr
        return str(ran.document["text"])

    greedy = r"42 - 17 = 25. \boxed{25}"
    assert text("--temperature", "2", "--top-k", "1") == greedy
    assert text("--repetition-penalty", "20", "--max-new-tokens", "20") != greedy
