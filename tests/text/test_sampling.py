"""Drawn tokens have the probabilities that were asked for, and a seed repeats them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebound.errors import MoeboundError
from moebound.text import sampling
from moebound.text.penalties import Penalties
from moebound.text.sampling import Sampler, likeliest, likely

SOME = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 3
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 63, 64, 1000])
def test_top_k_is_that_of_transformers(dtype: torch.dtype, count: int) -> None:
    from transformers import TopKLogitsWarper

    scores = SOME.to(dtype)
    scores[5] = scores[6]  # what is as likely as the last one stays
    expected = TopKLogitsWarper(count)(torch.empty(1, 0), scores[None])[0]
    assert torch.equal(likeliest(scores, count), expected)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_min_p_is_that_of_transformers(share: float) -> None:
    from transformers import MinPLogitsWarper

    scores = SOME.double()
    nothing: Any = torch.empty(1, 0)
    expected = MinPLogitsWarper(share)(nothing, scores[None])[0]
    assert torch.equal(likely(scores.softmax(0), share) > 0, expected.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(dtype: torch.dtype, penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, text = [3, 9, 9, 70], [1, 3]  # 70: an embedding that has no score
    penalties = Penalties(prompt, repetition=penalty)
    for token in text:
        penalties.add(token)
    scores = SOME.to(dtype)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[*prompt, *text]]), scores.float()[None]
    )[0]
    assert torch.equal(penalties.apply(scores), expected)
    assert torch.equal(scores, SOME.to(dtype))


def test_a_bias_is_that_of_transformers() -> None:
    from transformers import SequenceBiasLogitsProcessor

    bias = {2: -100.0, 7: 0.25}
    expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(
        torch.tensor([[1]]), SOME[None]
    )[0]
    assert torch.equal(Penalties([2], bias=bias).apply(SOME), expected)
    assert torch.equal(Penalties([2], bias={**bias, 70: 1.0}).apply(SOME), expected)


def test_presence_and_frequency_are_those_of_the_api() -> None:
    penalties = Penalties([4, 4, 4], presence=0.5, frequency=0.25)
    assert penalties.apply(SOME) is SOME  # the prompt does not count
    for token in (1, 2, 1, 1):
        penalties.add(token)
    expected = SOME.clone()
    expected[1] -= 3 * 0.25 + 0.5
    expected[2] -= 0.25 + 0.5
    assert torch.equal(penalties.apply(SOME), expected)


def test_top_k_top_p_and_min_p_together() -> None:
    # 0.64, 0.24, 0.09, 0.03 and 0.01 of the whole; 0.73 and 0.27 of the first two.
    assert set(drawn(Sampler(1.0, seed=1, top_k=2), SCORES, 300)) == {1, 2}
    assert set(drawn(Sampler(1.0, 0.7, seed=1, top_k=2), SCORES, 200)) == {1}
    assert set(drawn(Sampler(1.0, seed=1, min_p=0.3), SCORES, 200)) == {1, 2}
    assert set(drawn(Sampler(1.0, seed=1, min_p=0.4), SCORES, 200)) == {1}
    assert set(drawn(Sampler(1.0, 0.99, seed=1, min_p=0.1), SCORES, 400)) == {0, 1, 2}
    assert drawn(Sampler(1.0, seed=1), SCORES, 50) == drawn(
        Sampler(1.0, seed=1, top_k=0, min_p=0.0), SCORES, 50
    )
