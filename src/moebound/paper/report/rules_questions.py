"""Rules for the paper's open questions: whether a simulation predicts a codec, and what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from moebound.files.formats.study import METRICS
from moebound.paper.report import evidence as ev
from moebound.paper.report.cells import Cell
from moebound.paper.report.claims import WORDS
from moebound.paper.report.compare import NEAR
from moebound.paper.report.evidence import Evidence, Finding, factor
from moebound.paper.report.rules_conclusions import GAINS, gain
from moebound.paper.report.scene import Scene, deep, named
from moebound.paper.report.suite import Suite


def pairs(suite: Suite, simulation: str, codec: str) -> list[tuple[Cell, Cell]]:
    """Cells that differ in the source only."""
    real = {cell.key._replace(source=""): cell for cell in suite.cells
            if cell.key.source == codec}  # fmt: skip
    return [
        (cell, real[key])
        for cell in suite.cells
        if cell.key.source == simulation and (key := cell.key._replace(source="")) in real
    ]


def kl_ratios(found: list[tuple[Cell, Cell]]) -> list[float]:
    """KL of the first over KL of the second, where both are above 0."""
    return [
        _geometric(a.kls) / _geometric(b.kls)
        for a, b in found
        if a.kls and b.kls and min(*a.kls, *b.kls) > 0
    ]


def _geometric(values: tuple[float, ...]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def predicts(suite: Suite, simulation: str) -> Finding:
    """Does this simulation do to the model what the codec does?"""
    codec = suite.codec
    if codec is None:
        return ev.missing("a real codec")
    found = pairs(suite, simulation, codec)
    ratios = kl_ratios(found)
    mean = suite.mean_ratio(f"{simulation} over {codec}", ratios)
    differences = [
        (a, metric, d)
        for a, b in found
        for metric in METRICS
        if (d := suite.between(a, b, metric)) is not None
    ]
    if mean is None:
        return ev.missing(f"at least 3 conditions with both {simulation} and {codec}")
    edge = math.log(NEAR)
    outcome: ev.Outcome = (
        "supports" if -edge < mean.low and mean.high < edge
        else "contradicts" if mean.low > edge or mean.high < -edge else "open"
    )  # fmt: skip
    near = sum(1 / 2 <= ratio <= 2 for ratio in ratios)
    differ = [(a, metric, d) for a, metric, d in differences if d.lower or d.higher]
    why = (
        f"KL of the simulation over that of {codec}: {factor(mean)}, in {mean.n} conditions; "
        f"within a factor of 2 in {near} of them. Accuracies differ significantly in "
        f"{len(differ)} of {len(differences)} comparisons."
    )
    shown = [
        Evidence(f"{named(a)}: {metric.upper()} of the simulation {ev.points(d)}", "against")
        for a, metric, d in differ
    ]
    return Finding(outcome, why, tuple(shown))


def deep_gain_by_magnitude(suite: Suite) -> Finding:
    """All sources and bounds; for each bound the best that an error in a deep layer did."""
    scenes = [Scene(suite, source) for source in suite.sources]
    found: dict[float | None, list[tuple[float, Evidence]]] = {}
    for scene in scenes:
        for cell in deep([c for c in suite.cells if c.key.source == scene.source]):
            for metric in METRICS:
                difference = suite.to_baseline(cell, metric)
                if difference is not None:
                    text = f"{named(cell)}, {cell.key.source}: {metric.upper()}"
                    piece = Evidence(f"{text} {ev.points(difference)}", gain(difference))
                    found.setdefault(cell.key.rate, []).append((difference.value, piece))
    if not found:
        return ev.missing("errors in deep layers")
    everything = [piece for pieces in found.values() for _, piece in pieces]
    shown = []
    for rate in sorted(found, key=lambda rate: rate or math.inf):
        best = max(found[rate], key=lambda entry: entry[0])[1]
        name = "no bound" if rate is None else f"bound {100 * rate:g} %"
        count = ev.plural(len(found[rate]), "comparison")
        shown.append(Evidence(f"{name}, best of {count}: {best.text}", best.favours))
    return Finding(ev.some(everything), f"{ev.tally(everything, words=GAINS)}.", tuple(shown))


PATTERNS = ("shallow-harmless", "middle-most-sensitive", "deep-errors-help")
"""What the paper asks of other models: robust shallow, sensitive middle, gains from deep errors."""


def generalises(found: Mapping[str, Finding]) -> Finding:
    """By the verdicts on the three patterns."""
    outcomes = [found[name].outcome for name in PATTERNS]
    shallow, middle, deep_ = (WORDS["conclusion"][outcome] for outcome in outcomes)
    return Finding(
        ev.together(outcomes),
        f"Robust shallow layers: {shallow}. Sensitive middle: {middle}. Gains from deep errors: "
        f"{deep_}.",
    )


def never(claim_why: str) -> Finding:
    """A question that a study cannot answer."""
    return Finding("open", claim_why)
