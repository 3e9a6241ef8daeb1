"""Second moments to round by: those of an expert, shrunk toward its layer's, and damped.

An expert that saw few tokens has an H of few directions, and rounding by it alone gives up all
others. So its layer speaks for it, as if it had seen `pseudo` tokens more, of the layer's mean; and
its diagonal is raised by a share d of its mean, the more, the fewer tokens T there were for its N
channels:

    H'_e = H_e + pseudo · Σ H / Σ tokens     (sums over the layer's experts)
    H''_e = H'_e + d · mean(diag H'_e) · I     d = N / (10 T), from DAMPING to MOST_DAMPING

which is nearly H_e after many tokens, and the layer's where none came. Both numbers are those with
the least error of outputs on text held out, from 59 tokens an expert on; less damping than DAMPING
would have less of it still after thousands, and more KL (docs/log.md). Statistics on disk stay what
was seen.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import numpy as np

from moebound.files.formats.statistics import Side, Statistics
from moebound.types import Array, ExpertKey

DAMPING = 0.1
"""What is added to every H before it is factored (`feedback.py`): the least."""
PSEUDO_TOKENS = 4.0
TOKENS_A_CHANNEL = 10.0
MOST_DAMPING = 0.3
_LAYERS = 2
"""Layers whose means are kept: experts are asked for in the order of the model."""


class Shrinkage:
    """Shrunk moments of one folder of statistics. From any thread."""

    def __init__(self, statistics: Statistics, pseudo: float = PSEUDO_TOKENS) -> None:
        self.statistics, self.pseudo = statistics, pseudo
        self._means: OrderedDict[tuple[int, Side], Array] = OrderedDict()
        self._lock = Lock()

    def moments(self, key: ExpertKey, side: Side) -> Array:
        """H'' of one expert, float64, as `Statistics.moments`. Raises as that."""
        found = self.statistics.packed(key, side)
        if self.pseudo:
            found += self.pseudo * self._mean(key.layer, side)
        whole = self.statistics.whole(found, side)
        diagonal = whole if whole.ndim == 1 else np.einsum("ii->i", whole)  # a view
        share = len(whole) / (TOKENS_A_CHANNEL * max(self.statistics.tokens_of(key), 1))
        share = min(share, MOST_DAMPING) - DAMPING  # which is added anyway
        if share > 0:
            diagonal += share * diagonal.mean()
        return whole

    def _mean(self, layer: int, side: Side) -> Array:
        """H of the layer a token, packed; zeros where the layer saw none."""
        with self._lock:
            found = self._means.pop((layer, side), None)
            if found is None:
                found = self._read(layer, side)
            self._means[layer, side] = found
            while len(self._means) > 2 * _LAYERS:
                self._means.popitem(last=False)
            return found

    def _read(self, layer: int, side: Side) -> Array:
        keys = [key for key in self.statistics.keys if key.layer == layer]
        total, tokens = self.statistics.packed(keys[0], side), self.statistics.tokens_of(keys[0])
        for key in keys[1:]:  # one at a time: those of a layer may not fit
            total += self.statistics.packed(key, side)
            tokens += self.statistics.tokens_of(key)
        return total / max(tokens, 1)
