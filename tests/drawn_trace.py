"""Traces drawn at random, as small as they can be and still be traces."""

from __future__ import annotations

import numpy as np

from moebound.cache.trace import LayerTrace, Trace


def drawn_trace(
    *,
    n_tokens: int = 40,
    layers: tuple[int, ...] = (1, 2, 5),
    n_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    skip: bool = False,
) -> Trace:
    """A trace whose expert 0 is liked best and whose last is never chosen.

    skip: now and then nobody is chosen.
    """
    rng = np.random.default_rng(seed)
    likes = np.arange(n_experts - 1, -1, -1.0)
    entries = []
    for layer in layers:
        index = np.stack(
            [rng.choice(n_experts, top_k, replace=False, p=likes / likes.sum())
             for _ in range(n_tokens)]
        ).astype(np.int16)  # fmt: skip
        weights = rng.dirichlet([2.0] * top_k, n_tokens).astype(np.float32)
        if skip:
            nobody = rng.random(index.shape) < 0.1
            index[nobody], weights[nobody] = -1, 0
        entries.append(LayerTrace(layer, n_experts, index, weights))
    sequence = np.sort(rng.integers(0, 5, n_tokens)).astype(np.int32)
    return Trace(
        tuple(entries),
        token=rng.integers(0, 100, n_tokens).astype(np.int32),
        position=np.arange(n_tokens, dtype=np.int32),
        sequence=sequence,
        step=sequence.copy(),
        decode=rng.random(n_tokens) < 0.5,
        model="builtin:none",
        task="drawn",
    )
