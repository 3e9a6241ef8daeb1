"""Drawn tokens have the probabilities that were asked for, and a seed repeats them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound.errors import MoeboundError
from moebound.text import sampling
from moebound.text.sampling import Sampler

SCORES = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0])


def drawn(sampler: Sampler, scores: torch.Tensor, count: int) -> list[int]:
    return [sampler.choose(scores) for _ in range(count)]


def test_temperature_0_is_the_best_token() -> None:
    assert set(drawn(Sampler(0.0), SCORES, 5)) == {1}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = Counter(drawn(Sampler(temperature, seed=1), SCORES, 4000))
    expected = ((SCORES / temperature).softmax(0) * 4000).tolist()
    statistic = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(5))
    assert statistic < 23.5  # chi-squared of 4 degrees of freedom: once in 10,000 by chance


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # The two likeliest have 0.64 and 0.23 of the whole.
    assert set(drawn(Sampler(1.0, 0.6, seed=1), SCORES, 200)) == {1}
    assert set(drawn(Sampler(1.0, 0.8, seed=1), SCORES, 200)) == {1, 2}
    assert set(drawn(Sampler(1.0, 1e-9, seed=1), SCORES, 20)) == {1}


def test_a_nucleus_larger_than_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(1.0, 0.9, seed=7)
    whole = drawn(sampler, scores, 50)
    monkeypatch.setattr(sampling, "FIRST_LOOK", 3)
    assert drawn(Sampler(1.0, 0.9, seed=7), scores, 50) == whole


def test_a_seed_repeats_and_others_differ() -> None:
    flat = torch.zeros(1000)
    assert drawn(Sampler(1.0, seed=5), flat, 20) == drawn(Sampler(1.0, seed=5), flat, 20)
    assert drawn(Sampler(1.0, seed=5), flat, 20) != drawn(Sampler(1.0, seed=6), flat, 20)
    assert drawn(Sampler(1.0), flat, 20) != drawn(Sampler(1.0), flat, 20)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    drawn(Sampler(1.0, seed=5), SCORES, 3)
    assert torch.rand(1) == expected


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20),
    st.sampled_from([0.0, 1e-300, 1e-6, 1.0, 1e300]),
    st.sampled_from([1e-300, 0.5, 1.0]),
)
def test_any_scores_give_a_token(scores: list[float], temperature: float, top_p: float) -> None:
    token = Sampler(temperature, top_p, seed=0).choose(torch.tensor(scores))
    assert 0 <= token < len(scores)


def test_a_masked_token_is_never_drawn() -> None:
    scores = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    assert set(drawn(Sampler(2.0, seed=2), scores, 200)) == {1, 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_number_is_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(MoeboundError, match="no number"):
        Sampler(temperature).choose(torch.tensor([0.0, bad]))
