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


def lines_of(document: Path) -> list[str]:
    """Command lines of a document's blocks: of loops the bodies, without variables before them."""
    whole = [block.replace("\\\n", " ") for block in blocks(document, "sh")]  # lines that go on
    lines = [line.strip() for block in whole for line in block.splitlines()]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line) for line in lines]


def words_of(line: str) -> list[str]:
    return shlex.split(re.split(r"[<>|] ", line)[0], comments=True)


def commands(document: Path) -> list[list[str]]:
    """Every `moebound ...` of a document's blocks."""
    return [words_of(line)[1:] for line in lines_of(document) if line.startswith("moebound ")]


def mentioned(document: Path) -> list[list[str]]:
    """Every `moebound ...` in running text, which may be cut short."""
    text = document.read_text(encoding="utf-8").replace("\n", " ")
    return [words_of(line)[1:] for line in re.findall(r"`(moebound [a-z][^`]*)`", text)]


def command_of(document: Path, words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = cli
    rest = list(words)
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    assert command is not cli, f"{document.name}: no such command: {words}"
    return command, rest


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_their_options(document: Path) -> None:
    for words in [*commands(document), *mentioned(document)]:
        command, rest = command_of(document, words)
        known = {name for parameter in command.params for name in parameter.opts}
        given = {word for word in rest if word.startswith("-")}
        assert given <= known, f"{document.name}: {command.name} has no {given - known}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_can_be_typed_as_they_stand(
    document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are of the kind that options take, and nothing is missing; files need not be there."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, context: Path(value))
    for words in commands(document):
        command, rest = command_of(document, words)
        if "mean8" in rest or any("$" in word for word in rest):
            continue  # a method that the page itself adds; a loop's variable
        try:
            command.make_context(command.name, rest)
        except click.UsageError as error:
            pytest.fail(f"{document.name}: moebound {shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_block_makes_what_an_earlier_one_made(document: Path) -> None:
    """A reader who types all of a page would be told that the store exists already."""
    made: set[str] = set()
    for words in commands(document):
        command, rest = command_of(document, words)
        if command.name not in ("compress", "decompress") or len(rest) < 2:
            continue
        where = f"{document.name}: {shlex.join(words)}"
        assert rest[1] not in made or "--overwrite" in rest or "--resume" in rest, where
        made.add(rest[1])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_exist_with_their_options(document: Path) -> None:
    for line in lines_of(document):
        if script := re.match(r"(?:\S*/)?python3? ((?:bench|recipes|tests)/\S+\.py)", line):
            source = (ROOT / script[1]).read_text(encoding="utf-8")
            for option in (word for word in words_of(line) if word.startswith("--")):
                assert f'"{option}"' in source, f"{document.name}: {script[1]} has no {option}"


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
        # What plans and calibration need takes minutes: tests/cli/test_plan.py and
        # tests/methods/test_fisher.py have it on tiny models.
        plain = words[0] in ("inspect", "compress", "verify", "generate")
        if plain and len(words) > 1 and not {"--plan", "--calibration"} & set(words):
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
