"""`moebound eval`: the contract, and its bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import SRC, Run


def test_a_store_against_the_original(run: Run, store: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    args = ("--task", "wordmath", "--limit", 12, "--json")
    original = run("eval", SRC, *args, "--answers", before)
    assert original.code == 0
    total = original.document["total"]
    assert total["n"] == 12
    assert total["pia_share"]["low"] <= total["pia"] / 12 <= total["pia_share"]["high"]
    assert sum(tally["n"] for tally in original.document["by_format"].values()) == 12
    compared = run("eval", store, *args, "--answers", after, "--baseline", before)
    assert compared.code == 0
    assert compared.document["source"]["kind"] == "store"
    assert compared.document["source"]["weights"] != original.document["source"]["weights"]
    assert compared.document["baseline"]["pia"]["n"] == 12
    assert 0 <= compared.document["baseline"]["ica"]["p"] <= 1
    table = run("eval", SRC, *args[:-1], "--answers", before, "--baseline", after)
    assert table.code == 0
    assert "PIA" in table.stdout
    assert "McNemar" in table.stdout
    mixed = run("eval", store, *args, "--answers", before)
    assert mixed.code == 2
    assert "another evaluation" in mixed.stderr


def test_files_are_tasks(run: Run, tmp_path: Path) -> None:
    problems, text = tmp_path / "p.jsonl", tmp_path / "t.txt"
    problems.write_text(json.dumps({"prompt": "2 + 2 =", "answer": 4}) + "\n", encoding="utf-8")
    text.write_text("Ava has 2 books. Ava has 3 books.", encoding="utf-8")
    assert run("eval", SRC, "--task", problems, "--json").document["total"]["n"] == 1
    found = run("eval", SRC, "--task", text, "--json").document
    assert found["value"] > 1
    assert "perplexity" in run("eval", SRC, "--task", text).stdout
    assert run("eval", SRC, "--task", text, "--answers", tmp_path / "a").code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--task", "nosuch"], "there is no such file"),
     (["--task", "lm-eval:nosuch"], "lm-eval"),
     (["--task", "gsm8k", "--data", "/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
     (["--task", "wordmath", "--baseline", "/nowhere.jsonl"], "/nowhere.jsonl"),
     (["--task", "wordmath", "--limit", "0"], "0 is not in the range"),
     ([], "--task")],
)  # fmt: skip
def test_bad_input(run: Run, args: list[str], message: str) -> None:
    ran = run("eval", SRC, *args)
    assert ran.code == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
