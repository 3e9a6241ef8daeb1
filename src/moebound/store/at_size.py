"""The rate at which a method comes to a given size: found by encoding, a sample first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing

import numpy as np

from moebound.checkpoint import Checkpoint, Expert
from moebound.codec import thread_count
from moebound.errors import MethodError, PlanError
from moebound.files.formats.statistics import Statistics
from moebound.jobs.ordered import in_order
from moebound.methods import compress, get_method
from moebound.store.layout import select
from moebound.store.recipe import Recipe
from moebound.store.summary import Meter, ProgressCallback
from moebound.types import BoundScope, ErrorBound

SAMPLE = 8
TOLERANCE = 0.003
_STEPS = 12
NARROWEST, WIDEST = -10, 9
"""Octaves: rates of 1/1024 to 512 are tried."""
_PASSES = 6
"""Over all experts, at most; two are usual."""


class _Sizes:
    """Bits a weight of experts, at rates, by encoding them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        method: str,
        calibration: Statistics | None,
        scope: BoundScope = "expert",
        jobs: int = 1,
    ) -> None:
        self._checkpoint, self._calibration = checkpoint, calibration
        self._method, self._scope, self._jobs = method, scope, jobs

    def bits(self, of: Sequence[Expert], octave: float, meter: Meter | None = None) -> float:
        bound = ErrorBound(math.exp2(octave), "rate", self._scope)
        recipe = Recipe.of(bound, self._method, self._calibration)
        made = get_method(self._method)

        def size(expert: Expert) -> int:
            return compress(made, recipe.seen(self._checkpoint, [expert], made)).n_bytes

        n_bytes = 0
        with closing(in_order(size, of, jobs=self._jobs)) as sizes:
            for expert, found in zip(of, sizes, strict=True):
                n_bytes += found
                if meter is not None:
                    meter.add(str(expert.key), n_bytes=expert.n_bytes, experts=1)
        return 8 * n_bytes / sum(expert.size for expert in of)

    def near(self, experts: Sequence[Expert], bits_per_weight: float) -> float:
        """The octave of the rate at which a sample of these experts has the size."""
        # Spread so that neither one expert of every layer is taken, nor all of one layer.
        chosen = np.unique(np.linspace(0, len(experts) - 1, SAMPLE).round().astype(int))
        sample = [experts[at] for at in chosen]
        at, found = 0.0, self.bits(sample, 0.0)
        low, high = -math.inf, math.inf
        for _ in range(_STEPS):
            if abs(found - bits_per_weight) <= TOLERANCE * bits_per_weight:
                break
            low, high = (at, high) if found > bits_per_weight else (low, at)
            at += float(np.clip(found - bits_per_weight, -4, 4))
            if not low < at < high:
                at = (low + high) / 2
            found = self.bits(sample, at)
        return at


def rate_at(
    checkpoint: Checkpoint, method: str, calibration: Statistics, bits_per_weight: float
) -> float:
    """The rate at which `method` takes so many bits a weight, headers and all, over all experts.

    Found on a sample, then set right by one pass over all: halving a rate costs about a bit a
    weight.
    """
    experts, sizes = list(checkpoint.experts()), _Sizes(checkpoint, method, calibration)
    at = sizes.near(experts, bits_per_weight)
    return math.exp2(at + sizes.bits(experts, at) - bits_per_weight)


def rate_within(
    checkpoint: Checkpoint,
    bits_per_weight: float,
    *,
    method: str = "bounded:bound",
    calibration: Statistics | None = None,
    scope: BoundScope = "expert",
    layers: set[int] | None = None,
    experts: set[int] | None = None,
    shared_experts: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> float:
    """A rate at which the chosen experts take at most so many bits a weight, headers and all, and
    hardly less.

    Every expert is encoded, as a rule twice. The same for the same arguments. The rest is as of
    `compress`. Raises MethodError for a method that knows no rate, or sees more than one expert at
    a time, PlanError for a size that no rate comes to, and as `compress` does.
    """
    made = get_method(method)
    if not (made.takes_bound and made.needs_bound) or made.scope != "expert":
        raise MethodError(
            f"method {made.setting!r}: a size is met by a rate, for which a method has to keep "
            "bounds and see one expert at a time; leave out the size, or choose another method"
        )
    tasks = select(checkpoint, layers=layers, experts=experts, shared_experts=shared_experts)
    chosen = [task.expert for task in tasks if not task.exact]
    jobs = thread_count() if jobs is None else jobs
    sizes = _Sizes(checkpoint, method, calibration, scope, jobs)
    at = min(max(sizes.near(chosen, bits_per_weight), NARROWEST), WIDEST)
    low: float | None = None  # too large
    high: float | None = None  # small enough
    total = sum(expert.n_bytes for expert in chosen)
    found = math.inf
    for left in reversed(range(_PASSES)):
        found = sizes.bits(
            chosen, at, Meter(progress, total_bytes=total, total_experts=len(chosen))
        )
        if found <= bits_per_weight:
            high = at
            if found >= bits_per_weight * (1 - TOLERANCE) or at == NARROWEST:
                break
        else:
            low = at
            if at == WIDEST:
                break
        # A little wider than the line says, so that the next one is small enough.
        aim = bits_per_weight * (1 - TOLERANCE / 2)
        at += max(found - aim, math.log2(found / aim))  # sizes below a bit fall more slowly
        at = min(max(at, NARROWEST), WIDEST)
        if left == 1 and high is None:
            at = WIDEST
        if low is not None and high is not None and not low < at < high:
            at = (low + high) / 2
    if high is None:
        raise PlanError(
            f"{bits_per_weight:g} bits a weight: at rate {math.exp2(at):g} experts still take "
            f"{found:.3f}, headers and all; ask for more"
        )
    return math.exp2(high)
