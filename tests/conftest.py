"""Tiny checkpoints, each made once per test session; and how property tests draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

import forks

if TYPE_CHECKING:  # transformers takes longer to import than many a file's tests
    from tiny_models import MakeTiny

# What a property test finds is found again: every run draws the same examples, and however long one
# takes is right. `make fuzz` draws others each time (--hypothesis-profile=fuzz), keeps what failed
# in .hypothesis, and prints what reproduces it.
settings.register_profile(
    "fuzz", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("fixed", settings.get_profile("fuzz"), derandomize=True, database=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """tiny(name, **options of make_tiny) -> folder. Not to be written to: tests share it."""
    from transformers.utils import logging

    from tiny_models import make_tiny

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = make_tiny(name, tmp_path_factory.mktemp(name), **options)
        return made[key]

    return make


@pytest.fixture
def forked() -> Iterator[None]:
    """Processes that are begun are forked, where that is told from no other: see `forks`."""
    with forks.forked():
        yield
