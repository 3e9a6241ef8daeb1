"""The rules of `claims.py` for the paper's conclusions: which numbers are for, which against.

A rule asks for all of its comparisons before it looks at any (see `suite.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from moebound.files.formats.study import METRICS, Metric
from moebound.paper.report import evidence as ev
from moebound.paper.report.cells import RANDOMISED, Cell
from moebound.paper.report.claims import PTS, SEVERE_PTS
from moebound.paper.report.compare import SEVERE, Difference
from moebound.paper.report.evidence import Evidence, Favours, Finding, points
from moebound.paper.report.scene import (
    Pair,
    Scene,
    all_of,
    deep,
    first_decisive,
    middle,
    named,
    shallow,
)

BY_POSITION = ("4", "6", "7", "8", "9")


def _unchanged(difference: Difference) -> Favours:
    return "for" if difference.unchanged else "against" if difference.drops else "neither"


def _severe(difference: Difference) -> Favours:
    if difference.high < -SEVERE:
        return "for"
    spared = difference.low > -SEVERE and difference.can_fall > SEVERE
    return "against" if spared else "neither"


def _judged(
    scene: Scene,
    cells: Sequence[Cell],
    judge: Callable[[Difference], Favours],
    metrics: Sequence[Metric],
    what: str,
    words: tuple[str, str],
) -> Finding:
    found = scene.against_baseline(cells, judge, metrics)
    if cells and not found:
        return Finding("open", f"Only read for its predictions, or without a baseline: {what}.")
    if not found:
        return ev.missing(what)
    return Finding(ev.every(found), f"{ev.tally(found, words=words)}.", tuple(found))


_UNCHANGED = (f"unchanged within the margin of {PTS}", "significantly and clearly lower")
_SEVERE = (
    f"lower by more than {SEVERE_PTS}",
    f"where a drop of {SEVERE_PTS} is out of the question",
)


def rare_expert_harmless(scene: Scene) -> Finding:
    return _judged(scene, scene.table("3.2.1"), _unchanged, METRICS, "expert 0 with an error",
                   _UNCHANGED)  # fmt: skip


def randomised_expert_fatal(scene: Scene) -> Finding:
    cells = scene.suite.table("3.2.1", RANDOMISED)
    return _judged(scene, cells, _severe, ("pia",), "expert 0 randomised", _SEVERE)


def used_expert_robust(scene: Scene) -> Finding:
    cells = scene.table("3", rates=(0.5, 0.8))
    what = "the most used expert at 50 or 80 %"
    return _judged(scene, cells, _unchanged, ("pia",), what, _UNCHANGED)


def shallow_harmless(scene: Scene) -> Finding:
    cells = [cell for name in ("4", "5", "6", "7", "8", "9") for cell in scene.table(name)]
    what = "errors in shallow layers"
    return _judged(scene, shallow(cells), _unchanged, ("pia",), what, _UNCHANGED)


def layer_collapses(scene: Scene) -> Finding:
    cells = [cell for cell in scene.table("6") if cell.depth < 1]
    return _judged(scene, cells, _severe, ("ica",), "whole layers with an error", _SEVERE)


def format_first(scene: Scene) -> Finding:
    found = []
    cells = [cell for name in ("3", "4", "5") for cell in scene.table(name)]
    for cell in [*shallow(cells), *middle(cells)]:
        difference = scene.suite.decoupled(cell)
        if difference is not None:
            text = f"{named(cell)}: change in ICA minus change in PIA {points(difference)}"
            favours: Favours = (
                "for" if difference.lower else "against" if difference.higher else "neither"
            )
            found.append(Evidence(text, favours))
    return first_decisive("the most used experts with an error", ("accuracy", _once(found)))


def _once(evidence: list[Evidence]) -> list[Evidence]:
    """Each piece once: Table 4 may show a line of Table 3."""
    return list(dict.fromkeys(evidence))


def use_decides(scene: Scene) -> Finding:
    rare = {cell.key.rate: cell for cell in scene.table("3.2.1")}
    pairs = [(c, rare[c.key.rate]) for c in scene.table("3") if c.key.rate in rare]
    return scene.worse(pairs, "the most used expert beside expert 0 at equal bounds")


def non_monotonic(scene: Scene) -> Finding:
    """Deeper minus shallower, all pairs of layers of one table."""
    evidence: dict[str, list[Evidence]] = {"accuracy": [], "KL": []}
    for cells in scene.by_position("4", "8"):
        for metric in METRICS:
            steps = [
                (i, j, scene.suite.between(cells[j], cells[i], metric))
                for i, j in combinations(range(len(cells)), 2)
            ]
            evidence["accuracy"].append(_shape(cells, steps, metric.upper(), worse_is_lower=True))
        steps = [
            (i, j, scene.suite.kl_between(cells[j], cells[i]))
            for i, j in combinations(range(len(cells)), 2)
        ]
        evidence["KL"].append(_shape(cells, steps, "KL", worse_is_lower=False))
    return first_decisive(
        "most used experts at several depths",
        ("accuracy", evidence["accuracy"]),
        ("KL", evidence["KL"]),
    )


def _shape(
    cells: Sequence[Cell],
    steps: Sequence[tuple[int, int, Difference | None]],
    name: str,
    *,
    worse_is_lower: bool,
) -> Evidence:
    known = [(i, j, d) for i, j, d in steps if d is not None]
    worse = [(i, j) for i, j, d in known if (d.lower if worse_is_lower else d.higher)]
    better = [(i, j) for i, j, d in known if (d.higher if worse_is_lower else d.lower)]
    neighbours = {(i, i + 1) for i in range(len(cells) - 1)}
    monotone = neighbours <= set(worse) or neighbours <= set(better)
    favours: Favours = "for" if worse and better else "against" if monotone else "neither"
    values = [
        (cell.share("ica" if name == "ICA" else "pia") if name != "KL" else cell.kl)
        for cell in cells
    ]
    shown = ", ".join(
        f"{cell.label} {'?' if value is None else f'{value:.3g}'}"
        for cell, value in zip(cells, values, strict=True)
    )
    return Evidence(
        f"{name} by depth ({cells[0].key.task}): {shown}; of {ev.plural(len(known), 'pair')}, "
        f"{len(worse)} where the deeper layer hurts more, {len(better)} where it hurts less",
        favours,
    )


def middle_most_sensitive(scene: Scene) -> Finding:
    to_shallow, to_deep = _middle_pairs(scene)
    return all_of(
        _part("Against shallow layers", scene.worse(to_shallow, "middle and shallow layers")),
        _part("Against deep layers", scene.worse(to_deep, "middle and deep layers")),
    )


def shallow_like_middle(scene: Scene) -> Finding:
    to_shallow, _ = _middle_pairs(scene)
    return scene.worse(to_shallow, "middle and shallow layers")


def _middle_pairs(scene: Scene) -> tuple[list[Pair], list[Pair]]:
    groups = scene.by_position(*BY_POSITION)
    to_shallow = [(m, s) for cells in groups for m in middle(cells) for s in shallow(cells)]
    to_deep = [(m, d) for cells in groups for m in middle(cells) for d in deep(cells)]
    return to_shallow, to_deep


def protect_early(scene: Scene) -> Finding:
    groups = scene.by_position("5", *BY_POSITION)
    early = [(s, d) for cells in groups for s in shallow(cells) for d in deep(cells)]
    mid = [(m, d) for cells in groups for m in middle(cells) for d in deep(cells)]
    return all_of(
        _part("Shallow against deep", scene.worse(early, "shallow and deep layers", METRICS)),
        _part("Middle against deep", scene.worse(mid, "middle and deep layers", METRICS)),
    )


def _part(name: str, finding: Finding) -> Finding:
    return Finding(finding.outcome, f"{name}: {finding.why}", finding.evidence)


def deep_errors_help(scene: Scene) -> Finding:
    cells = [cell for cell in scene.suite.cells if cell.key.source == scene.source]
    found = scene.against_baseline(deep(cells), gain)
    if not found:
        return ev.missing("errors in deep layers")
    return Finding(ev.some(found), f"{ev.tally(found, words=GAINS)}.", tuple(found))


GAINS = ("with a gain beyond chance", f"that exclude a gain of {PTS}")


def gain(difference: Difference) -> Favours:
    """For: a gain beyond chance. Against: no gain that would matter is possible."""
    if difference.higher:
        return "for"
    return "against" if difference.no_gain else "neither"


def errors_add_up(scene: Scene) -> Finding:
    return scene.worse(
        _same_place(scene, "5", "4"), "six most used experts beside the most used", METRICS
    )


def groups_worse_than_one(scene: Scene) -> Finding:
    """Each group beside the single layer that is nearest to its middle."""
    return scene.worse(
        _same_place(scene, "7", "4"), "groups of layers beside single layers", METRICS
    )


def _same_place(scene: Scene, many: str, one: str) -> list[Pair]:
    """Cells of one table, each beside the nearest of another, at the same bound."""
    pairs = []
    for cell in scene.table(many):
        there = scene.table(one, rates=(cell.key.rate,) if cell.key.rate else None)
        if there:
            pairs.append((cell, min(there, key=lambda c: abs(c.depth - cell.depth))))
    return pairs
