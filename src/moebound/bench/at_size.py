"""The bound at which a method comes to a given size: found on a sample of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moebound.checkpoint import Checkpoint, Expert
from moebound.files.formats.statistics import Statistics
from moebound.methods import Method, compress, get_method
from moebound.store.recipe import Recipe
from moebound.types import ErrorBound

SAMPLE = 8
TOLERANCE = 0.003
_STEPS = 12


def rate_at(
    checkpoint: Checkpoint,
    method: str,
    calibration: Statistics | None,
    bits_per_weight: float,
    *,
    whole: bool = True,
) -> float:
    """The rate at which `method` takes so many bits a weight, headers and all, over all experts.

    Found on a sample, then set right by one pass over all, unless not `whole`: halving a rate costs
    about a bit a weight.
    """
    made = get_method(method)

    def bits(of: Sequence[Sequence[Expert]], rate: float) -> float:
        recipe = Recipe.of(ErrorBound(rate, "rate", "expert"), method, calibration)
        return measured(checkpoint, made, recipe, of)[0]

    groups = groups_of(checkpoint, made)
    some = sample(groups, made)
    at, found = 0.0, bits(some, 1.0)
    low, high = -math.inf, math.inf
    for _ in range(_STEPS):
        if abs(found - bits_per_weight) <= TOLERANCE * bits_per_weight:
            break
        low, high = (at, high) if found > bits_per_weight else (low, at)
        at += float(np.clip(found - bits_per_weight, -4, 4))
        if not low < at < high:
            at = (low + high) / 2
        found = bits(some, math.exp2(at))
    if not whole:
        return math.exp2(at)
    return math.exp2(at + bits(groups, math.exp2(at)) - bits_per_weight)


def groups_of(checkpoint: Checkpoint, method: Method) -> list[list[Expert]]:
    """Experts as the method sees them: one at a time, or a layer's."""
    experts = list(checkpoint.experts())
    if method.scope == "expert":
        return [[expert] for expert in experts]
    layers: dict[int, list[Expert]] = {}
    for expert in experts:
        layers.setdefault(expert.key.layer, []).append(expert)
    return list(layers.values())


def sample(groups: Sequence[Sequence[Expert]], method: Method) -> list[Sequence[Expert]]:
    """SAMPLE experts, spread so that neither one expert of every layer is taken, nor all of one
    layer; of methods that see a layer, the one in the middle."""
    if method.scope == "layer":
        return [groups[len(groups) // 2]]
    chosen = np.unique(np.linspace(0, len(groups) - 1, SAMPLE).round().astype(int))
    return [groups[at] for at in chosen]


def measured(
    checkpoint: Checkpoint,
    method: Method,
    recipe: Recipe,
    groups: Sequence[Sequence[Expert]],
) -> tuple[float, float]:
    """Bits a weight of these groups, and the mean square of what their weights are off by."""
    n_bytes, n_weights, squares = 0, 0, 0.0
    for group in groups:
        found = compress(method, recipe.seen(checkpoint, group, method))
        size = sum(expert.size for expert in group)
        n_bytes += found.n_bytes
        n_weights += size
        squares += found.rmse**2 * size
    return 8 * n_bytes / n_weights, squares / n_weights
