"""A store to load from, made once a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    src = make_tiny("mixtral", folder / "src")
    compress(open_checkpoint(src), folder / "dst", bound=ErrorBound(0.3, "rate"))
    return folder / "dst"
