"""Counting a trace: sums, means and the histogram are those of the choices themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from drawn_trace import drawn_trace
from moebound.cache.trace import LayerTrace
from moebound.errors import MoeboundError
from moebound.profile.usage import N_BINS, WEIGHT_EDGES, LayerUse


@pytest.mark.parametrize("skip", [False, True])
def test_counts_are_those_of_a_loop(skip: bool) -> None:
    entry = drawn_trace(n_tokens=200, top_k=3, skip=skip).layer(2)
    use = LayerUse.of(entry)
    given: dict[int, list[float]] = {expert: [] for expert in range(entry.n_experts)}
    for experts, weights in zip(entry.index, entry.weights, strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            if expert >= 0:
                given[int(expert)].append(float(weight))
    for expert, weights in given.items():
        assert use.counts[expert] == len(weights) == use.histogram[expert].sum()
        assert use.weight_sums[expert] == pytest.approx(sum(weights))
        if weights:
            assert use.mean_weights[expert] == pytest.approx(np.mean(weights))
            assert use.weight_deviations[expert] == pytest.approx(np.std(weights), abs=1e-6)
            bins = np.histogram(weights, [-math.inf, *WEIGHT_EDGES, math.inf])[0]
            np.testing.assert_array_equal(use.histogram[expert], bins)
        else:
            assert use.mean_weights[expert] == 0
    assert use.n_tokens == 200
    assert use.top_k == pytest.approx(2.7 if skip else 3, abs=0.1 if skip else 0)
    np.testing.assert_allclose(use.frequencies, use.counts / 200)


def test_the_ranking_puts_equals_in_the_order_of_their_index() -> None:
    index = np.array([[3], [3], [1], [0], [1], [4]], np.int16)
    use = LayerUse.of(LayerTrace(0, 6, index, np.ones((6, 1), np.float32)))
    assert use.ranking == (1, 3, 0, 4, 2, 5)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
def test_quantiles_are_right_to_a_tenth(share: float) -> None:
    entry = drawn_trace(n_tokens=3000, top_k=4).layer(1)
    use = LayerUse.of(entry)
    wanted = float(np.quantile(entry.weights, share))
    if wanted > WEIGHT_EDGES[0]:
        assert use.weight_quantile(share) == pytest.approx(
            wanted, rel=0.19 if share in (0, 1) else 0.1
        )
    mine = entry.weights[entry.index == 0]
    if 0.05 <= share <= 0.95:
        assert use.weight_quantile(share, 0) == pytest.approx(np.quantile(mine, share), rel=0.1)
    assert math.isnan(use.weight_quantile(share, 7))  # never chosen


def test_weights_beyond_the_histogram_are_kept_in_its_ends() -> None:
    weights = np.array([[1e-9], [0.5], [1e9]], np.float32)
    use = LayerUse.of(LayerTrace(0, 1, np.zeros((3, 1), np.int16), weights))
    assert use.histogram[0, 0] == use.histogram[0, N_BINS - 1] == 1
    assert use.weight_quantile(0.1) == WEIGHT_EDGES[0]
    assert use.weight_quantile(0.9) == WEIGHT_EDGES[-1]


def test_parts_add_up_to_the_whole() -> None:
    entry = drawn_trace(n_tokens=90).layer(5)
    whole = LayerUse.of(entry)
    parts = [LayerUse.of(LayerTrace(5, 8, entry.index[a:b], entry.weights[a:b]))
             for a, b in ((0, 30), (30, 31), (31, 90))]  # fmt: skip
    total = parts[0] + parts[1] + parts[2]
    for name in ("n_tokens", "counts", "histogram"):
        np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
    np.testing.assert_allclose(total.weight_sums, whole.weight_sums)
    np.testing.assert_allclose(total.weight_squares, whole.weight_squares)
    with pytest.raises(MoeboundError, match="not of one model"):
        _ = whole + LayerUse.of(drawn_trace().layer(2))


def test_nothing_chosen() -> None:
    use = LayerUse.of(LayerTrace(0, 4, np.empty((0, 2), np.int16), np.empty((0, 2), np.float32)))
    assert use.top_k == 0
    assert use.frequencies.tolist() == [0, 0, 0, 0]
    assert math.isnan(use.weight_quantile(0.5))
