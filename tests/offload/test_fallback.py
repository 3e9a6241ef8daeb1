"""Graded fallback: who gets a coarse copy, who is left out, and that prompts never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError, CheckpointError
from moebound.offload.fallback import Grades, shares_before
from moebound.offload.loading import load
from moebound.store import compress
from moebound.types import ErrorBound
from moebound.wordmath.builtin import resolve
from tiny_models import make_tiny

QUESTION = "Eli has 42 coins . Eli gives 17 coins to Ava ."


def test_shares_by_hand() -> None:
    chosen = np.array([[4, 1, 7], [7, 2, 4]])
    gates = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    expected = {1: 0.0, 7: 0.0, 4: 0.8, 2: 0.6}
    assert shares_before(chosen, gates) == pytest.approx(expected)


def test_grades() -> None:
    grades = Grades(0.6, 0.9)
    assert [grades.of(s) for s in (0.0, 0.6, 0.7, 0.9, 0.95)] == [
        "full", "full", "coarse", "coarse", "skip",
    ]  # fmt: skip
    assert Grades().of(1.0) == "full"
    for wrong in ((0.9, 0.6), (-0.1, None), (None, 1.5)):
        with pytest.raises(CacheError, match="from 0 to 1"):
            Grades(*wrong)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stores")
    source = open_checkpoint(resolve("builtin:wordmath"))
    for name, rate in (("fine", 0.1), ("coarse", 0.8)):
        compress(source, folder / name, bound=ErrorBound(rate, "rate"))
    return folder / "fine", folder / "coarse"


def run(store: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Logits of a prompt and of the token after it, and the statistics."""
    with load(store, dtype="float32", ram_budget="16%", tier="disk", **options) as offloaded:
        ids = offloaded.tokenizer(QUESTION, return_tensors="pt").input_ids
        with torch.inference_mode():
            first = offloaded.model(ids, use_cache=True)
            after = offloaded.model(ids[:, -1:], past_key_values=first.past_key_values)
        return first.logits, after.logits[:, -1], offloaded.stats()


def test_a_copy_that_is_no_coarser_changes_nothing(stores: tuple[Path, Path]) -> None:
    fine, _ = stores
    prompt, token, _ = run(fine)
    again = run(fine, coarse=fine, coarse_above=0.0)
    assert torch.equal(again[0], prompt)
    assert torch.equal(again[1], token)
    assert again[2]["fallback"]["coarse"] > 0
    assert again[2]["fallback"]["skipped"] == 0


def test_coarse_copies_and_gaps_move_tokens_and_never_prompts(stores: tuple[Path, Path]) -> None:
    fine, coarse = stores
    prompt, token, plain = run(fine)
    assert plain["fallback"] == {"coarse": 0, "skipped": 0}
    moved = []
    for options in ({"coarse": coarse, "coarse_above": 0.5}, {"skip_above": 0.5}):
        found = run(fine, **options)
        assert torch.equal(found[0], prompt)
        assert sum(found[2]["fallback"].values()) > 0
        moved.append(float((found[1] - token).abs().max()))
    assert 0 < moved[0] < moved[1]


def test_a_copy_of_another_model(stores: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_tiny("mixtral", tmp_path / "other")
    with pytest.raises(CheckpointError, match="coarse: its experts are not those"):
        load(stores[0], coarse=other)
