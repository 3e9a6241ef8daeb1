"""The rate at which a method comes to a given size, found by encoding, a sample first; or the plan
that does, by statistics that make one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebound.checkpoint import Checkpoint, Expert, open_checkpoint
from moebound.codec import thread_count
from moebound.errors import MethodError, PlanError
from moebound.files.formats.statistics import Statistics
from moebound.jobs.ordered import in_order
from moebound.methods import Method, compress, get_method
from moebound.methods.calibrated import Calibrated
from moebound.plan import Budget, Plan
from moebound.store.fisher import fisher_plan
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
    *,
    jobs: int = 1,
    meter: Meter | None = None,
) -> tuple[float, float]:
    """Bits a weight of these groups, and the mean square of what their weights are off by."""

    def one(group: Sequence[Expert]) -> tuple[int, float]:
        found = compress(method, recipe.seen(checkpoint, group, method))
        return found.n_bytes, found.rmse**2

    n_bytes, n_weights, squares = 0, 0, 0.0
    with closing(in_order(one, groups, jobs=jobs)) as every:
        for group, (size, mean_square) in zip(groups, every, strict=True):
            weights = sum(expert.size for expert in group)
            n_bytes += size
            n_weights += weights
            squares += mean_square * weights
            if meter is not None:
                total = sum(expert.n_bytes for expert in group)
                meter.add(str(group[0].key), n_bytes=total, experts=len(group))
    return 8 * n_bytes / n_weights, squares / n_weights


@dataclass(frozen=True)
class _Sizes:
    """Bits a weight of groups of experts, at rates, by encoding them."""

    checkpoint: Checkpoint
    method: Method
    calibration: Statistics | None
    scope: BoundScope = "expert"
    jobs: int = 1

    def bits(
        self, of: Sequence[Sequence[Expert]], octave: float, meter: Meter | None = None
    ) -> float:
        bound = ErrorBound(math.exp2(octave), "rate", self.scope)
        recipe = Recipe.of(bound, self.method.setting, self.calibration)
        return measured(
            self.checkpoint, self.method, recipe, of, jobs=self.jobs, meter=meter
        )[0]  # fmt: skip

    def near(self, some: Sequence[Sequence[Expert]], bits_per_weight: float) -> float:
        """The octave of the rate at which these have the size."""
        at, found = 0.0, self.bits(some, 0.0)
        low, high = -math.inf, math.inf
        for _ in range(_STEPS):
            if abs(found - bits_per_weight) <= TOLERANCE * bits_per_weight:
                break
            low, high = (at, high) if found > bits_per_weight else (low, at)
            at += float(np.clip(found - bits_per_weight, -4, 4))
            if not low < at < high:
                at = (low + high) / 2
            found = self.bits(some, at)
        return at


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
    groups, sizes = groups_of(checkpoint, made), _Sizes(checkpoint, made, calibration)
    at = sizes.near(sample(groups, made), bits_per_weight)
    if whole:
        at += sizes.bits(groups, at) - bits_per_weight
    return math.exp2(at)


def rate_within(
    checkpoint: Checkpoint | Path | str,
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
    checkpoint = open_checkpoint(checkpoint)
    tasks = select(checkpoint, layers=layers, experts=experts, shared_experts=shared_experts)
    chosen = [[task.expert] for task in tasks if not task.exact]
    jobs = thread_count() if jobs is None else jobs
    sizes = _Sizes(checkpoint, made, calibration, scope, jobs)
    at = min(max(sizes.near(sample(chosen, made), bits_per_weight), NARROWEST), WIDEST)
    low: float | None = None  # too large
    high: float | None = None  # small enough
    total = sum(expert.n_bytes for [expert] in chosen)
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


def within(
    checkpoint: Checkpoint | Path | str,
    bits_per_weight: float,
    *,
    method: str | None = None,
    calibration: Statistics | None = None,
    scope: BoundScope | None = None,
    layers: set[int] | None = None,
    experts: set[int] | None = None,
    shared_experts: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> tuple[str, ErrorBound | Plan]:
    """A method, and what brings the chosen experts to at most so many bits a weight: by statistics
    of `calibrate --fisher` the plan by them (`fisher_plan`), else one rate (`rate_within`).

    method: None for `calibrated` by such statistics, else our own codec. One rate it is, too, for
    other methods, where a scope is given, and for some experts or shared ones: plans are for all
    routed ones. The rest, and what is raised, is as of these two.
    """
    weighted = calibration is not None and calibration.of.fisher
    made = get_method(method or ("calibrated" if weighted else "bounded:bound"))
    whole = layers is None and experts is None and not shared_experts and scope is None
    if calibration is not None and weighted and whole and isinstance(made, Calibrated):
        return made.setting, fisher_plan(
            open_checkpoint(checkpoint), calibration, Budget(bpw=bits_per_weight),
            method=made.setting, jobs=jobs, progress=progress,
        )  # fmt: skip
    rate = rate_within(
        checkpoint, bits_per_weight, method=made.setting, calibration=calibration,
        scope=scope or "expert", layers=layers, experts=experts, shared_experts=shared_experts,
        jobs=jobs, progress=progress,
    )  # fmt: skip
    return made.setting, ErrorBound(rate, "rate", scope or "expert")
