"""The built-in model behind a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moebound.evaluate.loading import Loaded
from moebound.text.serve.engine import PlainEngine

from .live import Gate, Live, running


@pytest.fixture(scope="session")
def engine(loaded: Loaded) -> PlainEngine:
    return PlainEngine(loaded.model, loaded.tokenizer, loaded.source.to_json())


@pytest.fixture(scope="session")
def shared(engine: PlainEngine) -> Iterator[Live]:
    """One server for tests that leave it idle."""
    with running(engine, queue=4) as live:
        yield live


@pytest.fixture
def gate(engine: PlainEngine) -> Iterator[Gate]:
    """Before the model of every server here."""
    gate = Gate(engine.model)
    yield gate
    gate.remove()
