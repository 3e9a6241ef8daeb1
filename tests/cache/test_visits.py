"""One step of routing as the live cache is told of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebound.cache import ZipfTrace, gather, one_by_one, uniform
from moebound.cache.visits import LayerTrace, Trace, Visits, leading_first
from moebound.errors import CacheError

from .drawn import trace_of


def test_gather_counts_tokens_and_leads() -> None:
    index = np.array([[3, 1], [1, 0], [-1, -1]])
    weights = np.array([[0.9, 0.1], [0.5, 0.5], [0, 0]])
    # 3 and 1 lead their tokens; above 1 stands 0.9 in the first, above 0 stands 0.5 in the second.
    experts, tokens, leading = gather(index, weights, decode=True)
    assert (experts.tolist(), tokens.tolist(), leading) == ([0, 1, 3], [1, 2, 1], 3)
    experts, tokens, leading = gather(index[:1], weights[:1], decode=True)
    assert (experts.tolist(), tokens.tolist(), leading) == ([3, 1], [1, 1], 1)
    assert gather(index[:1], weights[:1], decode=False)[2] == 2
    assert gather(index[2:], weights[2:], decode=True)[0].tolist() == []


def test_a_trace_is_what_gather_says_step_by_step() -> None:
    trace = ZipfTrace(layers=2, experts=8, top_k=3, tokens=60, sequences=2, prompt=10).draw()
    visits = Visits.of_trace(trace, uniform(trace, 1))
    assert (visits.n_steps, visits.n_tokens, visits.top_k) == (42, 60, 3)
    for step, place, experts, tokens, leading, decode, fresh in visits.walk():
        rows = trace.step == step
        layer = trace.layers[place]
        expected = gather(layer.index[rows], layer.weights[rows], decode=decode)
        assert [e - 8 * place for e in experts] == expected[0].tolist()
        assert tokens == expected[1].tolist()
        assert leading == expected[2]
        assert decode == bool(trace.decode[rows].all())
        assert fresh == (place == 0 and bool((trace.position[rows] == 0).any()))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(0, 4), (0, 4)], "each once"),
        ([(-1, 4)], "expected decoder indices"),
        ([("a", 4)], "expected decoder indices"),
        ([(0, 10**12)], "1000000000000 experts, expected 1 to 32768"),
        ([(0, 4.5)], "4.5 experts"),
    ],
)
def test_layers_that_cannot_be(layers: list[tuple[int, int]], message: str) -> None:
    """What the trace's own reader lets through, because it looks at shapes only."""
    good = trace_of([[[0, 1]]], 4)
    index, weights = good.layers[0].index, good.layers[0].weights
    bad = Trace(
        tuple(LayerTrace(layer, n, index, weights) for layer, n in layers),
        good.token, good.position, good.sequence, good.step, good.decode,
    )  # fmt: skip
    with pytest.raises(CacheError, match=message):
        uniform(bad, 1)
    with pytest.raises(CacheError, match=message):
        Visits.of_trace(bad, uniform(good, 1))


def test_one_by_one_takes_a_batch_apart() -> None:
    # Two texts in one batch: a prompt of two tokens each, then a token each.
    trace = trace_of([[[0]], [[1]], [[2]], [[3]], [[0]], [[1]]], 4)
    batch = Trace(
        trace.layers, trace.token,
        position=np.array([0, 1, 0, 1, 2, 2], np.int32),
        sequence=np.array([0, 0, 1, 1, 0, 1], np.int32),
        step=np.array([0, 0, 0, 0, 1, 1], np.int32),
        decode=np.array([False] * 4 + [True] * 2),
    )  # fmt: skip
    apart = one_by_one(batch)
    assert apart.token.tolist() == [0, 1, 4, 2, 3, 5]
    assert apart.step.tolist() == [0, 0, 1, 2, 2, 3]
    visits = list(Visits.of_trace(apart, uniform(apart, 1)).walk())
    assert [(v[2], v[5], v[6]) for v in visits] == [
        ([0, 1], False, True), ([0], True, False), ([2, 3], False, True), ([1], True, False),
    ]  # fmt: skip
    drawn = ZipfTrace(layers=1, experts=4, top_k=1, tokens=50, sequences=2, prompt=5).draw()
    assert (one_by_one(drawn).step == drawn.step).all()  # has no batches


@given(
    gates=st.lists(st.floats(0.0625, 1.0, width=32), min_size=1, max_size=8),
    seed=st.integers(0, 100),
)
def test_one_token_without_arrays(gates: list[float], seed: int) -> None:
    experts = np.random.default_rng(seed).permutation(12)[: len(gates)]
    index, weights = experts[None].astype(np.int16), np.array([gates], np.float32)
    whole, tokens, leading = gather(index, weights, decode=True)
    found, n_leading = leading_first(experts.tolist(), weights[0].tolist())
    assert sorted(found) == sorted(whole.tolist())
    assert (tokens == 1).all()
    assert abs(n_leading - leading) <= 1  # where a share is 0.6, up to rounding
    by_gate = [weights[0][list(experts).index(expert)] for expert in found]
    assert by_gate == sorted(by_gate, reverse=True)


def test_one_token_by_hand() -> None:
    assert leading_first([5, 2, 9], [0.1, 0.7, 0.2]) == ([2, 9, 5], 1)
    assert leading_first([5, 2, -1], [0.5, 0.5, 0.0]) == ([2, 5], 2)
