"""How budgets are written."""

from __future__ import annotations

import pytest
import torch

from moebound.errors import CacheError
from moebound.offload.budget import available_memory, parse_budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (5000, 5000),
        ("5000", 5000),
        ("2KiB", 2048),
        ("2 kb", 2000),
        ("1.5GiB", 3 << 29),
        ("1G", 1 << 30),
        ("20%", 200),
        ("12.5 %", 125),
        ("150%", 1000),
    ],
)
def test_spellings(text: int | str, expected: int) -> None:
    assert parse_budget(text, of=1000) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", 0, -5, "0", "0%", "4XiB", "1e9", True])
def test_what_is_none(text: int | str) -> None:
    with pytest.raises(CacheError, match="expected a size, as 4GiB, or a share"):
        parse_budget(text, of=1000)


def test_memory_of_this_machine() -> None:
    assert 1 << 20 < available_memory(torch.device("cpu")) < 1 << 50
