"""`moebound generate`: options of sampling. tests/text has what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_several_prompts_have_the_texts_that_they_have_alone(run: Run) -> None:
    prompts = [QUESTION, "Zoe has 30 cards. Zoe gives 12 cards to Eli. How many has Zoe left?"]
    same = ["--chat", "--ram-budget", "30%", "--temperature", "0.9", "--seed", "3"]

    def generated(*some: str) -> dict[str, Any]:
        given = [part for prompt in some for part in ("--prompt", prompt)]
        ran = run("generate", "builtin:wordmath", *given, *same, "--stats", "--json")
        assert ran.code == 0, ran.stderr
        return ran.document

    together = generated(*prompts)
    for prompt, text in zip(prompts, together["texts"], strict=True):
        alone = generated(prompt)
        for field in ("text", "finish_reason", "prompt_tokens", "new_tokens"):
            assert text[field] == alone[field]
    n_new = sum(text["new_tokens"] for text in together["texts"])
    assert together["tokens_per_second"] == pytest.approx(n_new / together["total_s"])
    steps = max(text["new_tokens"] for text in together["texts"])
    assert steps <= together["stats"]["steps"] <= steps + 1  # the second begins a pass later
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    ran = run("generate", "builtin:wordmath", *given, *same, "--stats")
    shown = ran.stdout.index("[1] "), ran.stdout.index("[2] "), ran.stdout.index("texts")
    assert list(shown) == sorted(shown)


def test_memory_for_keys_and_values_is_a_size(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("moebound.offload.loading.load", fail)
    for command in (
        ["generate", "builtin:wordmath", "--prompt", "a"],
        ["serve", "builtin:wordmath"],
    ):
        ran = run(*command, "--kv-budget", "much")
        assert ran.code == 2
        assert "--kv-budget 'much'" in ran.stderr
        ran = run(*command, "builtin:wordmath", "--max-sequences", "0")
        assert ran.code == 2
