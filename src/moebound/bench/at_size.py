"""The bound at which a method comes to a given size: found on a sample of experts."""

from __future__ import annotations

import math

import numpy as np

from moebound.checkpoint import Checkpoint
from moebound.files.formats.statistics import Statistics
from moebound.methods import ExpertView, GroupView, compress, get_method
from moebound.store.recipe import Recipe
from moebound.types import ErrorBound

SAMPLE = 16
TOLERANCE = 0.003
_STEPS = 12


def rate_at(
    checkpoint: Checkpoint, method: str, calibration: Statistics, bits_per_weight: float
) -> float:
    """The rate at which `method` takes so many bits a weight, headers and all, over a sample of
    experts spread over the model. Halving a rate costs about a bit a weight, which leads there in a
    few steps."""
    recipe = Recipe.of(ErrorBound(1.0, "rate", "expert"), method, calibration)
    experts = list(checkpoint.experts())
    # Spread so that neither one expert of every layer is taken, nor all of one layer.
    chosen = np.unique(np.linspace(0, len(experts) - 1, SAMPLE).round().astype(int))
    sample = [experts[at] for at in chosen]
    made = get_method(method)
    statistics = recipe.statistics(made, [expert.key for expert in sample])
    read = [
        (e, {m.role: checkpoint.read(m) for m in e.matrices},
         frozenset(m.role for m in e.matrices if m.transposed))
        for e in sample
    ]  # fmt: skip

    def bits(rate: float) -> float:
        n_bytes = n_weights = 0
        for expert, matrices, transposed in read:
            bounds = dict.fromkeys(matrices, ErrorBound(rate, "rate", "expert"))
            view = ExpertView(expert.key, matrices, bounds, transposed)
            n_bytes += compress(made, GroupView((view,), statistics)).n_bytes
            n_weights += expert.size
        return 8 * n_bytes / n_weights

    at, found = 0.0, bits(1.0)
    low, high = -math.inf, math.inf
    for _ in range(_STEPS):
        if abs(found - bits_per_weight) <= TOLERANCE * bits_per_weight:
            break
        low, high = (at, high) if found > bits_per_weight else (low, at)
        at += float(np.clip(found - bits_per_weight, -4, 4))
        if not low < at < high:
            at = (low + high) / 2
        found = bits(math.exp2(at))
    return math.exp2(at)
