"""Rules for where errors go, for validity, use of experts, and the shape of a codec's error."""

from __future__ import annotations

import math

import numpy as np

from moebound.errors import MoeboundError
from moebound.files.formats.study import METRICS
from moebound.paper.report import compare
from moebound.paper.report import evidence as ev
from moebound.paper.report.cells import CODEC_PREFIX, NO_OUTPUT, share_interval
from moebound.paper.report.evidence import Evidence, Favours, Finding, factor, points
from moebound.paper.report.scene import Scene, first_decisive, named
from moebound.paper.report.suite import Suite
from moebound.profile.balance import balance as use_balance
from moebound.profile.profile import Profile

UNMOVED, MOVED = 1e-5, 0.01
_SILENT = ("silent", "that mostly answers")


def groups_fall_silent(scene: Scene) -> Finding:
    found = []
    for cell in (cell for cell in scene.table("7", rates=(0.8,)) if cell.n):
        low, high = share_interval(cell.valid, cell.n)
        favours: Favours = "for" if high < NO_OUTPUT else "against" if low > 0.5 else "neither"
        text = f"{named(cell)}: {100 * cell.valid:.1f} % of outputs valid"
        found.append(Evidence(f"{text} [{100 * low:.1f}, {100 * high:.1f}]", favours))
    if not found:
        return ev.missing("groups of layers at 80 %")
    return Finding(ev.every(found), f"{ev.tally(found, 'group', _SILENT)}.", tuple(found))


def rerouting(scene: Scene) -> Finding:
    """Does the perturbed layer's own router decide otherwise, on the same text?"""
    layers = scene.suite.study.layers
    shares, found = [], []
    for cell in scene.table("3"):
        at = layers.index(cell.key.layers[0])
        for row in cell.rows:
            if row.routing is None or at >= len(row.routing):
                continue
            share, later = row.routing[at], max(row.routing[at + 1 :], default=0.0)
            favours: Favours = (
                "against" if share < UNMOVED else "for" if share > MOVED else "neither"
            )
            shares.append(share)
            text = (
                f"{named(cell)}, seed {row.seed}: {100 * share:.3g} % of decisions change in the "
                f"layer itself, at most {100 * later:.3g} % in one behind it"
            )
            found.append(Evidence(text, favours))
    if not found:
        return ev.missing("routing changes in the most used expert's layer")
    if max(shares) < UNMOVED:
        why = (
            "On the same text, no decision of the perturbed layer changes. Its router decides "
            "before its experts compute, from an input that they do not touch."
        )
        return Finding("contradicts", why, tuple(found))
    return Finding(ev.every(found), f"{ev.tally(found, 'run')}.", tuple(found))


def cascade(scene: Scene) -> Finding:
    """Relative residual change behind the last decoder layer over that behind the perturbed one."""
    study = scene.suite.study
    ratios, found = [], []
    for cell in (cell for name in ("3", "4", "5", "6") for cell in scene.table(name)):
        if cell.key.layers[-1] == study.layers[-1]:
            continue
        values = [
            row.residual[-1] / row.residual[cell.key.layers[-1]]
            for row in cell.rows
            if row.residual is not None
            and len(row.residual) > cell.key.layers[-1]
            and row.residual[cell.key.layers[-1]] > 0
            and row.residual[-1] > 0
        ]
        if values:
            ratios.append(math.exp(float(np.log(values).mean())))
            text = f"{named(cell)}: at the last layer {ratios[-1]:.3g} times that behind the error"
            found.append(Evidence(text, "for" if ratios[-1] > 1 else "against"))
    mean = scene.suite.mean_ratio(f"cascade {scene.source}", ratios)
    if mean is None:
        return ev.missing("residual changes in at least 3 conditions")
    why = f"Relative change at the last layer over that at the perturbed layer: {factor(mean)}."
    outcome = _sign(mean.adjusted, mean.value)
    return Finding(outcome, why, tuple(dict.fromkeys(found)))


def _sign(p: float, value: float) -> ev.Outcome:
    if not p < compare.ALPHA:
        return "open"
    return "supports" if value > 0 else "contradicts"


def harder_task_suffers(scene: Scene) -> Finding:
    found = []
    for hard_table, easy_table in (("8", "4"), ("9", "7")):
        easy = {(c.key.layers, c.key.rate): c for c in scene.table(easy_table)}
        easy_by_depth = {(round(c.depth, 2), c.key.rate): c for c in scene.table(easy_table)}
        for cell in scene.table(hard_table):
            twin = easy.get((cell.key.layers, cell.key.rate)) or easy_by_depth.get(
                (round(cell.depth, 2), cell.key.rate)
            )
            if twin is None or twin.key.task == cell.key.task:
                continue
            for metric in METRICS:
                difference = scene.suite.across_tasks(cell, twin, metric)
                if difference is not None:
                    favours: Favours = (
                        "for" if difference.lower else "against" if difference.higher else "neither"
                    )
                    text = f"{named(cell)} against {twin.key.task}: change in {metric.upper()}"
                    found.append(Evidence(f"{text} {points(difference)}", favours))
    return first_decisive("the same errors on two tasks", ("accuracy", found))


def few_experts_work(suite: Suite) -> Finding:
    profile = _profile(suite)
    if profile is None:
        return ev.missing("use of the experts (no profile in the study)")
    ginis = {
        layer.layer: use_balance(layer.counts).gini
        for layer in profile.tasks[0].layers
        if layer.counts.any()
    }
    if not ginis:
        return ev.missing("use of the experts (an empty profile)")
    low, high = min(ginis.values()), max(ginis.values())
    outcome: ev.Outcome = "supports" if low > 0.3 else "contradicts" if high < 0.1 else "open"
    return Finding(
        outcome,
        f"Gini coefficient between {low:.2f} and {high:.2f} over {len(ginis)} layers "
        f"({profile.tasks[0].task}).",
    )


def harder_task_more_experts(suite: Suite) -> Finding:
    profile = _profile(suite)
    if profile is None or len(profile.tasks) < 2:
        return ev.missing("use of the experts on two tasks")
    easy, hard = (
        {layer.layer: use_balance(layer.counts).entropy for layer in task.layers
         if layer.counts.any()}
        for task in profile.tasks[:2]
    )  # fmt: skip
    ratios = [math.exp(hard[layer] - easy[layer]) for layer in easy if layer in hard]
    mean = suite.mean_ratio("entropy", ratios)
    if mean is None:
        return ev.missing("use of the experts in at least 3 layers")
    return Finding(
        _sign(mean.adjusted, mean.value),
        f"Normalised entropy, hard minus easy: {mean.value:+.3f} [{mean.low:+.3f}, "
        f"{mean.high:+.3f}], {ev.p_value(mean.adjusted)}, over {mean.n} layers.",
    )


def _profile(suite: Suite) -> Profile | None:
    path = suite.study.profile
    if path is None:
        return None
    try:
        return Profile.load(path)
    except MoeboundError:
        return None  # said on the page: the claims that need it stay open


def error_is_normal(suite: Suite) -> Finding:
    """By source: the root mean square over the bound, and what lies beyond it."""
    found = []
    for source in suite.sources:
        if not source.startswith(CODEC_PREFIX):
            continue
        rows = [row for cell in suite.cells if cell.key.source == source for row in cell.rows]
        beyond = [float(r.realised["beyond"]) for r in rows if _is_number(r.realised, "beyond")]
        shape = [
            float(r.realised["rmse"]) / float(r.realised["max_abs_error"])
            for r in rows
            if _is_number(r.realised, "rmse") and _is_number(r.realised, "max_abs_error")
            and r.realised["max_abs_error"] > 0
        ]  # fmt: skip
        if not beyond or not shape:
            continue
        # The largest error is at most ε (nothing is beyond), so rmse / ε is at most rmse / largest.
        inside = max(beyond) == 0 and max(shape) < 0.7
        favours: Favours = "against" if inside else "for" if min(beyond) > 0.2 else "neither"
        found.append(
            Evidence(
                f"{source}: at most {100 * max(beyond):.3g} % of the weights beyond ε; root mean "
                f"square at most {max(shape):.2f} of the largest error (uniform: 0.58) over "
                f"{ev.plural(len(rows), 'run')}",
                favours,
            )
        )
    if not found:
        return ev.missing("the error of a real codec")
    words = ("spread like a Gaussian", "that stays inside of its bound, as no Gaussian does")
    return Finding(ev.every(found), f"{ev.tally(found, 'codec', words)}.", tuple(found))


def _is_number(data: object, name: str) -> bool:
    value = data.get(name) if isinstance(data, dict) else None
    return isinstance(value, (int, float)) and not isinstance(value, bool)
