from __future__ import annotations

from collections.abc import Iterator

import pytest

from .made import ALL, known


@pytest.fixture(autouse=True)
def _methods_of_the_tests() -> Iterator[None]:
    with known(*ALL):
        yield
