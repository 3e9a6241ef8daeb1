"""The built-in model, loaded once."""

from __future__ import annotations

import pytest

from moebound.evaluate.loading import Loaded, load


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """Not to be changed."""
    return load("builtin:wordmath")
