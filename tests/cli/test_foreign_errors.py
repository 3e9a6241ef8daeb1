"""Errors that other libraries and the terminal raise: what a user is told of them."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

import moebound
from moebound.cli.main import main
from moebound.errors import CheckpointError
from moebound.types import ErrorBound
from moebound.wordmath.builtin import resolve

from .conftest import Run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of the test's own. Stores of it say what it says: changed later, they are
    damaged."""
    folder = tmp_path / "source"
    shutil.copytree(resolve("builtin:wordmath"), folder)
    return folder


def stored(source: Path) -> Path:
    folder = source.with_name("store")
    moebound.compress(source, folder, bound=ErrorBound(0.3, "rate"), layers={1})
    return folder


@pytest.fixture
def unreadable(source: Path) -> Path:
    """A store whose tokenizer is of a version of `tokenizers` that does not exist."""
    path = source / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["model"]["vocab"] = [{"new": "format"}]
    path.write_text(json.dumps(found), encoding="utf-8")
    return stored(source)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "hi"],
        ["eval", "--task", "wordmath", "--limit", "1"],
        ["serve", "--port", "0"],
    ],
)
def test_a_tokenizer_that_cannot_be_read(run: Run, unreadable: Path, command: list[str]) -> None:
    name, *options = command
    ran = run(name, unreadable, *options)
    assert ran.code == 2
    assert f"{unreadable}: cannot be loaded as a tokenizer: " in ran.stderr
    assert "internal error" not in ran.stderr


def test_a_model_needs_no_tokenizer_until_it_is_asked_for(unreadable: Path) -> None:
    offloaded = moebound.load(unreadable)
    with pytest.raises(CheckpointError, match="cannot be loaded as a tokenizer"):
        offloaded.tokenizer  # noqa: B018
    offloaded.close()


def test_a_model_without_tokenizer(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()
    with moebound.load(stored(source)) as offloaded:
        assert offloaded.tokenizer is None


def test_a_template_that_fails(run: Run, source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages[7].x }}", encoding="utf-8")
    ran = run("generate", stored(source), "--prompt", "hi", "--chat")
    assert ran.code == 2
    assert "the chat template refuses the messages" in ran.stderr


def test_a_stdout_that_is_closed(monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0
    sys.stdout.close()


def test_a_character_that_the_terminal_cannot_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="latin-1"))
    assert main(["inspect", str(tmp_path / "n€")]) == 2
    sys.stderr.flush()
    assert b"n\\u20ac" in written.getvalue()
