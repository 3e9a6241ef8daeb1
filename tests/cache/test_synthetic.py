"""Drawn traces follow the law they claim, and settings that make none are refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moebound.cache import ZipfTrace, load_trace
from moebound.errors import CacheError


def test_shares_are_those_of_the_law() -> None:
    trace = ZipfTrace(layers=2, experts=8, top_k=1, tokens=40_000, sequences=1, topic=0,
                      exponent=1.0, locality=0.3).draw()  # fmt: skip
    for layer in trace.layers:
        shares = np.sort(np.bincount(layer.index[:, 0], minlength=8))[::-1] / 40_000
        law = 1 / np.arange(1, 9)
        np.testing.assert_allclose(shares, law / law.sum(), atol=0.015)
    assert (trace.layers[0].index != trace.layers[1].index).mean() > 0.3


def test_locality_makes_choices_last() -> None:
    repeated = []
    for locality in (0.0, 0.5, 0.9):
        trace = ZipfTrace(layers=1, tokens=1000, sequences=1, exponent=0, topic=0,
                          locality=locality).draw()  # fmt: skip
        pairs = pairwise(trace.layers[0].index.tolist())
        repeated.append(np.mean([len(set(one) & set(other)) for one, other in pairs]) / 6)
    assert repeated[0] == pytest.approx(6 / 64, abs=0.02)
    assert repeated[0] + 0.2 < repeated[1] < repeated[2] - 0.2


def test_the_shape_of_a_trace(tmp_path: Path) -> None:
    drawn = ZipfTrace.parse("zipf:layers=3,experts=8,top_k=2,tokens=1300,sequences=2,prompt=100")
    trace = drawn.draw()
    assert [layer.layer for layer in trace.layers] == [1, 2, 3]
    assert trace.n_tokens == 1300
    assert (trace.position[:100] == np.arange(100)).all()
    assert trace.decode.sum() == 1100
    assert trace.step[99] == 0
    assert trace.step[650] - trace.step[649] == 1
    assert trace.step[-1] == 2 * (1 + 550) - 1
    for layer in trace.layers:
        assert all(len(set(row)) == 2 for row in layer.index)
        np.testing.assert_allclose(layer.weights.sum(axis=1), 1, atol=2e-3)
        assert (layer.weights[:, 0] >= layer.weights[:, 1]).all()
    trace.save(tmp_path / "trace.npz")
    again = load_trace(tmp_path / "trace.npz")
    np.testing.assert_array_equal(again.layers[2].index, drawn.draw().layers[2].index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pareto", "expected zipf"),
        ("zipf:layer=3", "'layer' is none of layers, experts"),
        ("zipf:tokens=many", "tokens 'many' is no int"),
        ("zipf:tokens=0", "tokens 0: expected 1 or more"),
        ("zipf:top_k=9,experts=8", "8 experts, 9 of them chosen"),
        ("zipf:experts=40000", "fewer than 32768"),
        ("zipf:locality=1", "locality from 0 to below 1"),
        ("zipf:exponent=nan", "exponent nan"),
        ("zipf:sequences=10,tokens=5", "10 sequences of 5 tokens"),
        ("zipf:tokens=999999999999", "draws"),
    ],
)
def test_settings_that_make_no_trace(text: str, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        ZipfTrace.parse(text)
