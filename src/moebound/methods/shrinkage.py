"""Second moments to round by: those of an expert, shrunk toward its layer's.

An expert that saw few tokens has an H of few directions, and rounding by it alone gives up all
others. So its layer speaks for it, as if it had seen `pseudo` tokens more, of the layer's mean:

    H'_e = H_e + pseudo · Σ H / Σ tokens     (sums over the layer's experts)

which is H_e's alone after many tokens, and the layer's where none came. Empirical Bayes with a
prior of that many tokens. Statistics on disk stay what was seen.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from moebound.files.formats.statistics import Side, Statistics
from moebound.types import Array, ExpertKey

PSEUDO_TOKENS = 16.0
"""By what was measured on text held out (docs/log.md)."""
_LAYERS = 2
"""Layers whose means are kept: experts are asked for in the order of the model."""


class Shrinkage:
    """Shrunk moments of one folder of statistics. From any thread."""

    def __init__(self, statistics: Statistics, pseudo: float = PSEUDO_TOKENS) -> None:
        self.statistics, self.pseudo = statistics, pseudo
        self._means: OrderedDict[tuple[int, Side], Array] = OrderedDict()
        self._lock = Lock()

    def moments(self, key: ExpertKey, side: Side) -> Array:
        """H' of one expert, float64, as `Statistics.moments`. Raises as that."""
        found = self.statistics.packed(key, side)
        if self.pseudo:
            found += self.pseudo * self._mean(key.layer, side)
        return self.statistics.whole(found, side)

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
