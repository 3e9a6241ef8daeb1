"""Reading from the first changed layer on gives what reading from the beginning gives."""

from __future__ import annotations

import math

import pytest

from moebound.paper.study import reading as reading_module
from moebound.paper.study.measure import Measurer
from moebound.paper.study.reading import Reading
from moebound.score import Score
from moebound.sensitivity.perturb import perturbed
from moebound.sensitivity.selectors import parse_selector
from moebound.types import ErrorBound

from .conftest import LAYERS


def fresh(measurer: Measurer) -> Reading:
    pairs, _ = measurer._pairs("wordmath", 3)
    return Reading(measurer._loaded.model, measurer._experts, pairs)


def compared(measurer: Measurer, reading: Reading, layer: int, first: int) -> Score:
    keys = parse_selector(f"layer:{layer}").resolve(measurer._experts, None)
    experts = measurer._experts.pick(keys)
    with perturbed(experts, "gaussian-sd", ErrorBound(0.5, "rate", "expert"), seed=1):
        return reading.compare(first)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_start_changes_nothing(measurer: Measurer, layer: int) -> None:
    reading = fresh(measurer)
    whole = compared(measurer, reading, layer, 0)
    assert reading.starts_at(layer)
    assert compared(measurer, reading, layer, layer) == whole
    assert whole.kl_nats > 0
    assert whole.answer_kl_nats > 0
    assert whole.where is not None
    assert len(whole.where["residual"]) == 4
    assert whole.where["residual"][:layer] == [0.0] * layer
    assert min(whole.where["residual"][layer:]) > 0


def test_a_model_that_cannot_be_started_is_run_whole(
    measurer: Measurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = fresh(measurer)
    whole = compared(measurer, reading, 3, 0)
    monkeypatch.setattr(reading_module, "same_logits", lambda want, got: False)
    assert not reading.starts_at(3)
    assert not reading.starts_at(0)
    assert compared(measurer, reading, 3, 3) == whole


def test_a_model_that_says_nothing_is_infinitely_far(measurer: Measurer) -> None:
    reading = fresh(measurer)
    norm = measurer._loaded.model.model.norm.weight
    kept = norm.data.clone()
    try:
        norm.data.fill_(math.nan)
        found = reading.compare()
    finally:
        norm.data.copy_(kept)
    assert found.kl_nats == found.answer_kl_nats == math.inf
    assert found.top1_agreement == found.answer_top1_agreement == 0
    assert reading.compare().kl_nats == 0
