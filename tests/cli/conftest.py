"""Runs a command line in this process, and makes one small store for all tests to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moebound.cli.main import main

SRC = "builtin:wordmath"


@dataclass(frozen=True)
class Ran:
    """What a command line left: exit code, stdout, stderr."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as exactly one JSON document; json.loads refuses anything before or behind it."""
        found = json.loads(self.stdout)
        assert isinstance(found, dict)
        return found


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> Ran:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the built-in model at rate 0.3. Not to be changed; see `own_store`."""
    path = tmp_path_factory.mktemp("cli") / "store"
    assert main(["compress", SRC, str(path), "--rate", "0.3", "--layers", "1", "-q"]) == 0
    return path


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(store, tmp_path / "own"))
