"""Search for a plan on the loss that is measured: the whole model, all experts changed as planned.

Losses of single experts do not add up. Over all tokens most of a KL comes from routers that change
their minds, and errors in one layer change what errors in another cost. So this measures whole
plans, all of one size, and keeps the better one, as RCO (2605.00649) does with gradients: there is
a budget of real bytes that every plan keeps, and no model of the loss has the last word.

  start    one rate for all, which loses K. Then every layer alone, at that rate and an octave or
           two about it, which loses K_l(α). Over the layers the sum of K_l(α_l)^m is made least
           within the bytes, on hulls (`allocate.py`). With m = 1 losses add up; they come to more
           than K, and with another m to K. Both are tried, and both by half. Then, if that takes
           no more than half of the measurements left, every expert alone, and the same within
           each layer (`told_apart`). Where a sensitivity map predicts losses, the plan that they
           ask for is tried, too, and layers by what was measured with experts by what is
           predicted: a map knows little of what routers do, which is most in the first layers
  search   one number of the shape after another (`shape.py`): each layer's, each role's, and how
           much of the difference between a layer's experts is made good; half an octave finer, or
           coarser where finer is no better. A sweep that found nothing is followed by one of half
           the step

A plan is better if its loss is lower, and by more than noise: a few problems make most of a KL, so
this is asked of the square roots of the problems' losses, in pairs (`_better`). So the loss never
rises, on these problems. That it is lower on others is to be measured on others: the least of many
measurements is partly luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from moebound.errors import PlanError
from moebound.plan.allocate import within_bytes as hull_within_bytes
from moebound.plan.fit import Fit
from moebound.plan.items import Floats, Ints, Items
from moebound.plan.measured import Measured
from moebound.plan.plan import Plan
from moebound.plan.shape import Shape, within_bytes
from moebound.score.record import finite
from moebound.types import ExpertKey

LINEAR, SQUARE = 1.0, 2.0
"""Powers of the rate that KL with routers' jumps grows with, and squared errors."""
STEP = 0.5
FINEST = 0.125
OCTAVES = (0.0, 1.0, -1.0, 2.0)
"""About one rate for all, at which every layer alone is measured, for as long as there are half of
the measurements left."""
PARTS = (1.0, 0.5)
"""Of the way from one rate to what losses of layers ask for."""
_LEAST, _MOST = 1.0, 4.0
"""Of m."""
_SURE = 1.5
"""Standard errors by which a better plan is better."""

Say = Callable[[str, int, int], None]
"""Called with what was measured, how many measurements were made, and how many there may be."""


class Tries(Protocol):
    """What tries plans. The same for the same plan."""

    def measure(self, plan: Plan, layer: int | None = None, expert: int | None = None) -> Measured:
        """With all experts changed as planned, those of one layer, or one of them."""


@dataclass(frozen=True)
class Found:
    """plan: the best, of this shape. measured: on the problems of the search. first: what one rate
    for all measures there. n: measurements made."""

    plan: Plan
    shape: Shape
    measured: Measured
    first: Measured
    n: int

    def to_json(self) -> dict[str, Any]:
        """For people."""
        return {
            "n_measured": self.n,
            "n_problems": self.measured.n_problems,
            "kl_of_one_rate": finite(self.first.kl),
            "kl": finite(self.measured.kl),
            "shape": self.shape.to_json(),
        }


def search(
    items: Items,
    fit: Fit,
    plan_of: Callable[[Floats], Plan],
    tries: Tries,
    n_most: int,
    *,
    say: Say = lambda *_: None,
) -> Found:
    """The best plan that so many measurements find, one rate for all among them.

    plan_of: the plan that gives items these rates. Raises PlanError where nothing is left of the
    model with one rate for all, and what `tries` raises.
    """
    run = _Run(items, fit, plan_of, tries, n_most, say)
    run.take(Shape(), "one rate")
    if not math.isfinite(run.best.kl):
        raise PlanError(
            "one rate for all leaves nothing of the model at this size, so there is nothing to "
            "search from; ask for a larger one"
        )
    first = run.best
    if items.hull is not None:
        for part in reversed(PARTS):
            run.take(Shape(losses=part), f"predicted losses, {part:g} of the way")
    curves = run.curves() if len(run.layers) > 1 else {}
    for power in joinings(curves, first.kl):
        whole = joined(items, fit, curves, run.wide, power)
        for part in PARTS:
            shape, what = whole.scaled(part), f"layers by losses^{power:.2f}, {part:g} of the way"
            run.take(shape, what)
            if items.hull is not None:
                run.take(replace(shape, experts=1.0), f"{what}, experts by predicted losses")
    if items.hull is None:
        run.told_apart()
    run.sweeps(_numbers(run.items, {layer: at[0.0] for layer, at in curves.items()}))
    return Found(run.plan, run.shape, run.best, first, run.n)


Curves = Mapping[int, Mapping[float, float]]
"""What each layer alone loses, by octaves about one rate for all."""


def joinings(curves: Curves, together: float) -> list[float]:
    """Powers m to try: losses that add up, and such that they come to what was measured of all."""
    if not curves:
        return []
    alone = np.array([curve[0.0] for curve in curves.values()])
    return sorted({_LEAST, joining(alone, together)})


def joined(items: Items, fit: Fit, curves: Curves, wide: float, power: float) -> Shape:
    """Layers' rates by what each loses alone. wide: the rate of all at 0 octaves."""
    layers = sorted(curves)
    by_octave = (len(items.rates) - 1) / math.log2(items.rates[-1] / items.rates[0])
    low, high = (math.log2(rate / wide) for rate in (items.rates[0], items.rates[-1]))
    at = np.arange(math.ceil(low * by_octave), math.floor(high * by_octave) + 1) / by_octave
    # What is beyond the measured octaves by a step or two may be hoped for; more is not known.
    known = [octave for curve in curves.values() for octave in curve]
    at = at[(at >= min(known) - 1) & (at <= max(known) + 1)]
    of = np.array([layers.index(key.layer) for key in items.keys])
    sizes = np.stack(
        [np.bincount(of, items.sizes_at(np.full(len(of), wide * 2.0**o))) for o in at], axis=1
    )
    lost = np.stack([_along(curves[layer], at) for layer in layers]) ** power
    chosen = hull_within_bytes(sizes.astype(np.int64), lost, max(fit.budget_bytes, _least(sizes)))
    return Shape({layer: float(at[c]) for layer, c in zip(layers, chosen.tolist(), strict=True)})


def joining(alone: Floats, together: float) -> float:
    """m, for which the sum of alone^m is together^m; 1 to 4."""
    low, high = _LEAST, _MOST
    if not together > 0 or not (alone > 0).any():
        return _LEAST
    for _ in range(40):
        middle = (low + high) / 2
        if float(((alone / together) ** middle).sum()) > 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _least(sizes: Ints) -> int:
    return int(sizes[:, -1].sum())


def _along(curve: Mapping[float, float], at: Floats) -> Floats:
    """A curve between and beyond what was measured of it: powers of the rate, rising."""
    x = np.array(sorted(curve))
    values = np.array([curve[octave] for octave in x])
    largest = values[np.isfinite(values)].max(initial=1.0)
    # A model of which nothing is left is as far as it gets, and a loss of nothing is some loss.
    values = np.where(np.isfinite(values), values, 16 * largest)
    logs = np.log2(np.maximum(np.maximum.accumulate(values), 1e-6 * largest))
    # Narrower than what was measured, as between the narrowest two; wider, as the square.
    slope = float(np.clip((logs[1] - logs[0]) / (x[1] - x[0]), 0.5, 2)) if len(x) > 1 else 1.0
    below, above = np.minimum(at - x[0], 0), np.maximum(at - x[-1], 0)
    return np.asarray(2.0 ** (np.interp(at, x, logs) + slope * below + 2 * above))


def _numbers(items: Items, losses: Mapping[int, float]) -> list[tuple[str, int | str]]:
    """A shape's numbers, layers that lose most first."""
    layers = sorted({key.layer for key in items.keys}, key=lambda layer: -losses.get(layer, 0.0))
    found: list[tuple[str, int | str]] = [("layers", layer) for layer in layers if len(layers) > 1]
    if all(len(group) == 1 for group in items.roles):
        found += [("roles", role) for role in sorted({role for (role,) in items.roles})]
    found += [("experts", 0)] * (items.within is not None)
    found += [("losses", 0)] * (items.hull is not None)
    return found


class _Run:
    def __init__(
        self,
        items: Items,
        fit: Fit,
        plan_of: Callable[[Floats], Plan],
        tries: Tries,
        n_most: int,
        say: Say,
    ) -> None:
        self.items, self.fit, self.plan_of = items, fit, plan_of
        self.tries, self.n_most, self.say = tries, n_most, say
        self.layers = sorted({key.layer for key in items.keys})
        self.n = 0
        self.seen = set[str]()
        self.shape = Shape()
        self.plan: Plan
        self.best: Measured

    @property
    def left(self) -> bool:
        return self.n < self.n_most

    def curves(self) -> Curves:
        """Of all layers or of none, at one octave at least."""
        found: dict[int, dict[float, float]] = {layer: {} for layer in self.layers}
        for octave in OCTAVES:
            if 2 * (self.n + len(self.layers)) > self.n_most:
                break
            rates = np.full(len(self.items.keys), self.wide * 2.0**octave)
            plan = self.plan_of(np.clip(rates, self.items.rates[0], self.items.rates[-1]))
            for layer in self.layers:
                measured = self.tries.measure(plan, layer)
                found[layer][octave] = measured.kl
                self._count(f"layer {layer} alone, {octave:+g} octaves: {measured.kl:.3g}")
        return found if all(found.values()) else {}

    def told_apart(self) -> None:
        """What every expert alone loses at its rate of now, where half of what is left is enough
        to measure that; and the shape with half and all of the difference made good."""
        keys = list(dict.fromkeys(self.items.keys))
        if 2 * len(keys) > self.n_most - self.n:
            return
        lost = dict[ExpertKey, float]()
        for key in keys:
            lost[key] = self.tries.measure(self.plan, key.layer, key.expert).kl
            self._count(f"{key} alone: {lost[key]:.3g}")
        self.items = self.items.with_within(lost, LINEAR)
        for part in (STEP, 2 * STEP):
            self.take(replace(self.shape, experts=part), f"experts by losses, {part:g} of the way")

    @property
    def wide(self) -> float:
        """The rate of the grid that one rate for all is near."""
        values = [bound.value for bound in self.first.bounds]
        middle = float(np.median(np.log(values)))
        return float(self.items.rates[np.abs(np.log(self.items.rates) - middle).argmin()])

    def take(self, shape: Shape, what: str) -> bool:
        """Whether a shape is better than the best so far, which it then is."""
        if self.n and not self.left:
            return False
        try:
            plan = self.fit(lambda n_bytes: self._shaped(shape, n_bytes))
        except PlanError:
            if not self.n:
                raise
            return False
        if plan.sha256 in self.seen:
            return False
        self.seen.add(plan.sha256)
        found = self.tries.measure(plan)
        better = self.n == 0 or _better(found, self.best)
        if not self.n:
            self.first = plan
        if better:
            self.shape, self.plan, self.best = shape, plan, found
        self._count(f"{what}: {found.kl:.4g}, best {self.best.kl:.4g}")
        return better

    def _shaped(self, shape: Shape, n_bytes: int) -> Plan:
        return self.plan_of(within_bytes(self.items, shape, n_bytes))

    def _count(self, what: str) -> None:
        self.n += 1
        self.say(what, self.n, self.n_most)

    def sweeps(self, numbers: list[tuple[str, int | str]]) -> None:
        step = STEP
        while step >= FINEST and self.left and numbers:
            taken = 0
            for number in numbers:
                taken += self.left and self._along(*number, step)
            if not taken:
                step /= 2

    def _along(self, kind: str, name: int | str, step: float) -> bool:
        whole = kind in ("experts", "losses")
        what = kind if whole else f"{kind.removesuffix('s')} {name}"
        for by in (step, -step) if whole else (-step, step):
            taken = False
            while self.left and self.take(self.shape.moved(kind, name, by), f"{what} {by:+g}"):
                taken = True
            if taken:
                return True
        return False


def _better(found: Measured, best: Measured) -> bool:
    """Whether the mean is lower, and the mean of the square roots by more than noise."""
    at = 0 if found.tokens == "all" else 1
    new, old = (np.array(one.score.kl_sums)[:, at] for one in (found, best))
    if not np.isfinite(new).all() or new.sum() >= old.sum():
        return False
    difference = np.sqrt(np.maximum(new, 0)) - np.sqrt(np.maximum(old, 0))
    n = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return bool(difference.mean() < -_SURE * error)
