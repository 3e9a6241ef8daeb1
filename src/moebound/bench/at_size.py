"""The bound at which a method comes to a given size: found on a sample of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moebound.checkpoint import Checkpoint, Expert
from moebound.files.formats.statistics import Statistics
from moebound.methods import compress, get_method
from moebound.store.recipe import Recipe
from moebound.types import ErrorBound

SAMPLE = 8
TOLERANCE = 0.003
_STEPS = 12


def rate_at(
    checkpoint: Checkpoint, method: str, calibration: Statistics, bits_per_weight: float
) -> float:
    """The rate at which `method` takes so many bits a weight, headers and all, over all experts.

    Found on a sample, then set right by one pass over all: halving a rate costs about a bit a
    weight.
    """
    experts = list(checkpoint.experts())
    # Spread so that neither one expert of every layer is taken, nor all of one layer.
    chosen = np.unique(np.linspace(0, len(experts) - 1, SAMPLE).round().astype(int))
    sample = [experts[at] for at in chosen]
    made = get_method(method)

    def bits(of: Sequence[Expert], rate: float) -> float:
        recipe = Recipe.of(ErrorBound(rate, "rate", "expert"), method, calibration)
        n_bytes = sum(
            compress(made, recipe.seen(checkpoint, [expert], made)).n_bytes for expert in of
        )
        return 8 * n_bytes / sum(expert.size for expert in of)

    at, found = 0.0, bits(sample, 1.0)
    low, high = -math.inf, math.inf
    for _ in range(_STEPS):
        if abs(found - bits_per_weight) <= TOLERANCE * bits_per_weight:
            break
        low, high = (at, high) if found > bits_per_weight else (low, at)
        at += float(np.clip(found - bits_per_weight, -4, 4))
        if not low < at < high:
            at = (low + high) / 2
        found = bits(sample, math.exp2(at))
    return math.exp2(at + bits(experts, math.exp2(at)) - bits_per_weight)
