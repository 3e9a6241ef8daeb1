"""A store that the interpreter of kernels gets through."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import SMALL, make_tiny


def store_of_few_steps(folder: Path) -> Path:
    """Two layers of three experts, matrices of a few steps, a row a segment: made in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (
            ("hidden_size", 32),
            ("intermediate_size", 32),
            ("num_local_experts", 3),
        ):
            patch.setitem(SMALL, name, size)
        source = open_checkpoint(make_tiny("mixtral", folder / "src"))
    compress(source, folder / "dst", bound=ErrorBound(0.3, "rate"), codec="bound:segment=32")
    return folder / "dst"
