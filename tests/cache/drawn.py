"""Traces written by hand, or drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from moebound.cache import Trace
from moebound.cache.visits import LayerTrace

Steps = Sequence[Sequence[Sequence[int]]]
"""By step, then layer: experts chosen. One token a step."""


def trace_of(steps: Steps, n_experts: int, *, new_at: Sequence[int] = (0,)) -> Trace:
    """A trace of decode steps, one token each; sequences begin at the steps `new_at`."""
    n_layers, k = len(steps[0]), max(len(chosen) for step in steps for chosen in step)
    index = np.full((len(steps), n_layers, k), -1, np.int16)
    for at, step in enumerate(steps):
        for layer, chosen in enumerate(step):
            index[at, layer, : len(chosen)] = chosen
    order = np.arange(len(steps), dtype=np.int32)
    sequence = np.searchsorted(np.array(new_at), order, side="right").astype(np.int32)
    return Trace(
        tuple(
            LayerTrace(layer, n_experts, index[:, layer], np.full((len(steps), k), 1 / k, "f2"))
            for layer in range(n_layers)
        ),
        token=order,
        position=order,
        sequence=sequence,
        step=order,
        decode=np.ones(len(steps), bool),
        model="by hand",
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Prefill and decode steps, several sequences, routers that skip; experts often repeat."""
    n_layers, n_experts = draw(st.integers(1, 3)), draw(st.integers(2, 8))
    k = draw(st.integers(1, min(3, n_experts)))
    n_tokens = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popular = rng.permutation(n_experts)
    scores = rng.gumbel(size=(n_tokens, n_layers, n_experts)) - np.log1p(popular)
    index = np.argsort(-scores, axis=-1)[..., :k].astype(np.int16)
    index[rng.random(index.shape) < 0.1] = -1
    index[0, 0, 0] = 0
    if k > 1:
        index[0, 0, 1:] = -1
    prompt = draw(st.integers(0, n_tokens))
    step = np.maximum(np.arange(n_tokens) - max(prompt - 1, 0), 0).astype(np.int32)
    sequence = np.sort(rng.integers(0, 3, n_tokens)).astype(np.int32)
    weights = rng.random(index.shape).astype("f2")
    return Trace(
        tuple(
            LayerTrace(2 * layer + 1, n_experts, index[:, layer], weights[:, layer])
            for layer in range(n_layers)
        ),
        token=np.full(n_tokens, -1, np.int32),
        position=np.arange(n_tokens, dtype=np.int32),
        sequence=sequence,
        step=step,
        decode=np.arange(n_tokens) >= prompt,
    )
