"""`moebound generate`: options of sampling. tests/text has what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moebound.cli.offload import time_spent, where_time_went

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
        ["--linears", "auto"],
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


def test_linear_layers_without_codes(run: Run) -> None:
    ran = run("generate", "builtin:wordmath", "--prompt", "a", "--linears", "codes")
    assert ran.code == 2
    assert "--others 0.1" in ran.stderr


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


STATS: dict[str, Any] = {
    "choice": {"tier": "disk", "source": "compressed"},
    "tiers": {"decoded": 41, "disk": 59},
    "stall_s": {"room": 0.001, "read": 0.4, "decode": 0.7},
    "compute_s": 0.9, "experts_s": 2.101, "step_s": 3.0,
}  # fmt: skip


def test_where_the_time_went_in_words() -> None:
    assert where_time_went(STATS, 3.2) == (
        "Of 3.20 s, 1.10 s were waiting for experts (0.40 s reading from disk, 0.70 s decoding), "
        "0.90 s computing experts, 0.10 s handing them over, 0.90 s attention and the other "
        "layers, and 0.20 s everything else, such as choosing tokens. 41.0 % of the experts asked "
        "for were in memory, ready to compute with."
    )
    raw = {**STATS, "choice": {"tier": "ram", "source": "raw"}, "tiers": {"decoded": 0, "ram": 0}}
    said = where_time_went(raw, 12.34)
    assert "Of 12.3 s" in said
    assert "0.40 s reading from RAM, 0.70 s putting them in place" in said
    assert said.endswith("No expert was asked for.")
    never = {**STATS, "stall_s": {"room": 0.0, "read": 0.0, "decode": 0.0}}
    assert "0.00 s were waiting for experts, 0.90 s" in where_time_went(never, 3.2)


def test_the_parts_of_a_real_run_add_up(run: Run) -> None:
    words = ["generate", "builtin:wordmath", "--prompt", QUESTION, "--chat", "--ram-budget", "20%",
             "--tier", "disk", "--stats", "--max-new-tokens", "8"]  # fmt: skip
    ran = run(*words, "--json")
    assert ran.code == 0, ran.stderr
    spent, stats = ran.document["time"], ran.document["stats"]
    assert spent == time_spent(stats, spent["total_s"])
    parts = [spent[name] for name in ("experts_s", "handling_s", "other_layers_s", "outside_s")]
    assert sum(parts) + sum(spent["waiting_s"].values()) == pytest.approx(spent["total_s"])
    assert min(parts) > 0
    assert sum(spent["waiting_s"].values()) > 0
    ran = run(*words)
    flat = " ".join(ran.stdout.split())
    assert " were waiting for experts (" in flat
    assert "of the experts asked for were in memory" in flat
