"""README and the documents: their commands exist, their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from moebound.cli.main import cli, main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md",
        "recipes/wordmath/README.md", "src/moebound/wordmath/model/README.md",
        "src/moebound/wordmath/mixtral/README.md",
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    )
]  # fmt: skip


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(document: Path) -> list[list[str]]:
    """Every `moebound ...` of a document, in blocks and in running text."""
    text = document.read_text(encoding="utf-8")
    whole = [block.replace("\\\n", " ") for block in blocks(document, "sh")]  # lines that go on
    lines = [line for block in whole for line in block.splitlines()]
    lines += re.findall(r"`(moebound [a-z][^`]*)`", text.replace("\n", " "))
    ours = [line.partition(">")[0] for line in lines if line.startswith("moebound ")]
    return [shlex.split(line, comments=True)[1:] for line in ours]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_their_options(document: Path) -> None:
    for words in commands(document):
        command: click.Command = cli
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not cli, f"{document.name}: no such command: {words}"
        known = {name for parameter in command.params for name in parameter.opts}
        given = {word for word in words if word.startswith("-")}
        assert given <= known, f"{document.name}: {command.name} has no {given - known}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_goals_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"\bmake ([a-z]+)\b", "\n".join(blocks(document, "sh"))):
        assert re.search(rf"^{goal}:", makefile, flags=re.MULTILINE), goal


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.slow
def test_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(ROOT / "README.md"):
        # What a plan needs takes minutes: tests/cli/test_plan.py has it on a tiny model.
        plain = words[0] in ("inspect", "compress", "verify") and "--plan" not in words
        if plain and len(words) > 1:
            assert main(words) == 0, words
    load, offload, arrays = blocks(ROOT / "README.md", "python")
    capsys.readouterr()
    exec(compile(load, "README.md", "exec"), {})
    exec(compile(offload, "README.md", "exec"), {})
    assert "\\boxed{25}" in capsys.readouterr().out
    exec(compile(arrays, "README.md", "exec"), {})


@pytest.mark.slow
def test_walkthrough_runs(tmp_path: Path) -> None:
    names: dict[str, Any] = {"folder": tmp_path}
    for number, block in enumerate(blocks(ROOT / "docs" / "walkthrough.md", "python")):
        exec(compile(block, f"walkthrough.md, block {number}", "exec"), names)
    assert names["used"].item() == float(names["decoded"][3, 5])
