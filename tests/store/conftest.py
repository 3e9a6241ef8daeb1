"""Tiny checkpoints and stores, each made once per test session; and what tests ask of a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from moebound.checkpoint import open_checkpoint
from moebound.store import CompressSummary, compress
from moebound.types import ErrorBound
from tiny_models import make_tiny

RATE = ErrorBound(0.1, "rate", "expert")

MakeSource = Callable[..., Path]
MakeStore = Callable[..., tuple[Path, Path]]


def run(src: Path, dst: Path, **options: Any) -> CompressSummary:
    """compress(), with a rate of 0.1 and a shard size that makes several shards."""
    options = {"bound": RATE, "jobs": 2, "shard_bytes": 40_000, **options}
    return compress(open_checkpoint(src), dst, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """File name -> bytes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """source(name, **options of make_tiny) -> folder. Not to be written to."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str = "deepseek_v3", **options: Any) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(name, tmp_path_factory.mktemp(name) / "src", **options)
            (made[key] / "tokenizer.json").write_text('{"model": {}}')
            (made[key] / "README.md").write_text("# tiny")
        return made[key]

    return make


@pytest.fixture(scope="session")
def shared_store(source: MakeSource, tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """shared_store(name, **options of compress) -> (source, store). Not to be written to."""
    made: dict[tuple[Any, ...], tuple[Path, Path]] = {}

    def make(name: str = "deepseek_v3", **options: Any) -> tuple[Path, Path]:
        key = (name, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            src, dst = source(name), tmp_path_factory.mktemp("store") / "dst"
            run(src, dst, **options)
            made[key] = src, dst
        return made[key]

    return make


@pytest.fixture
def own_store(shared_store: MakeStore, tmp_path: Path) -> MakeStore:
    """As shared_store, in a copy that the test may damage."""

    def make(name: str = "deepseek_v3", **options: Any) -> tuple[Path, Path]:
        src, dst = shared_store(name, **options)
        return src, Path(shutil.copytree(dst, tmp_path / "own"))

    return make
