"""Tiny checkpoints, each made once per test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from tiny_models import MakeTiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """tiny(name, **options of make_tiny) -> folder. Not to be written to: tests share it."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(name, tmp_path_factory.mktemp(name), **options)
        return made[key]

    return make
