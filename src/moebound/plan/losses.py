"""Predicted loss of each item at each rate, from what was measured: a sensitivity map or a study.

Measurements are at a few rates, plans at 25. Between two measured rates loss is taken for a power
of the rate; beyond them for its square, which is what second-order (Fisher) theory says of small
errors, and above the widest is on the safe side. `exponent` says what power the data have.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moebound.checkpoint.families import HALVES
from moebound.errors import PlanError
from moebound.files.documents import Document
from moebound.files.formats import profile
from moebound.files.formats.sensitivity_map import ExpertLine, RoleLine, SensitivityMap
from moebound.files.formats.study import Row
from moebound.plan.items import ExpertSizes, Floats, Items
from moebound.types import ExpertKey

# A map of one checkpoint says nothing about another: their mean |weight| must agree this far.
_SAME_MODEL = 1e-3


def power_law(measured: Floats, loss: Floats, rates: Floats) -> Floats:
    """[N, R] loss at `rates`, from losses [N, M] at the ascending rates `measured` [M]."""
    tiny = np.finfo(np.float64).tiny
    x, at = np.log(measured), np.log(rates)
    y = np.log(np.maximum(np.maximum.accumulate(loss, axis=1), tiny))
    inside = np.clip(at, x[0], x[-1])
    logs = np.stack([np.interp(inside, x, row) for row in y])
    return np.where(logs > np.log(2 * tiny), np.exp(logs + 2 * (at - inside)), 0.0)


def exponent(measured: Floats, loss: Floats) -> float | None:
    """The power of the rate that loss grows with: the median over items and neighbouring rates.

    2 where second-order theory holds. None for one rate, or no losses above 0.
    """
    good = (loss[:, :-1] > 0) & (loss[:, 1:] > 0)
    if not good.any():
        return None
    grown = np.log(loss[:, 1:][good] / loss[:, :-1][good])
    steps = np.broadcast_to(np.diff(np.log(measured)), good.shape)[good]
    return float(np.median(grown / steps))


def from_sensitivity(
    found: SensitivityMap, experts: Sequence[ExpertSizes], *, per_role: bool
) -> tuple[Items, dict[str, Any]]:
    """Items with the losses of a sensitivity map, and what a plan should say about them.

    Of a map that says which part of a loss comes from routers that change their mind (`flips_kl`),
    the other part is taken: flips do not add up (a near tie flips once, and each expert that could
    flip it is charged for it), so a plan that believes them spends its bytes in the wrong places.
    Of a map that does not, predictions are brought to the level of what was measured, on all
    experts or a sample, layer by layer and rate by rate.
    Raises PlanError for an expert that is missing, another model.
    """
    items, loss, facts = _measured(found, experts, per_role=per_role)
    return items.with_loss(power_law(np.array(found.bounds), loss, items.rates)), facts


def from_errors(
    found: SensitivityMap, experts: Sequence[ExpertSizes], *, per_role: bool
) -> tuple[Items, dict[str, Any]]:
    """The same for a method that rounds by statistics, whose errors a map has not measured.

    A map says what codec `bound` loses, `ExpertSizes.plain` what squared error that leaves in the
    residual stream: so it is known what an error costs there. The method's own errors
    (`ExpertSizes.errors`) are taken to cost as much: loss is a function of the error, a power of it
    between two that were measured, and in proportion beyond. Raises as `from_sensitivity`.
    """
    items, loss, facts = _measured(found, experts, per_role=per_role)
    by_key = {expert.key: expert for expert in experts}
    tiny = np.finfo(np.float64).tiny
    rows = []
    for i, (key, roles) in enumerate(zip(items.keys, items.roles, strict=True)):
        expert = by_key[key]
        plain = np.sum([expert.plain[role] for role in roles], axis=0)
        errors = np.sum([expert.errors[role] for role in roles], axis=0)
        good = (plain > tiny) & (loss[i] > tiny)
        if not good.any():
            rows.append(np.zeros(len(items.rates)))
            continue
        x = np.maximum.accumulate(np.log(plain[good]))
        y = np.maximum.accumulate(np.log(loss[i][good]))
        at = np.log(np.maximum(errors, tiny))
        rows.append(np.exp(np.interp(at, x, y) + at - np.clip(at, x[0], x[-1])))
    return items.with_loss(np.array(rows)), {**facts, "losses": f"{facts['losses']}, by errors"}


def _measured(
    found: SensitivityMap, experts: Sequence[ExpertSizes], *, per_role: bool
) -> tuple[Items, Floats, dict[str, Any]]:
    """Items, what a map says of them at its rates [N, M], and what a plan should say about that."""
    rates = np.array(found.bounds)
    lines = {line.key: line for line in found.experts}
    items = Items.of(experts, per_role=per_role)
    missing = [expert.key for expert in experts if expert.key not in lines]
    if missing:
        raise PlanError(f"no sensitivity of {_some(missing)}; was it another model?")
    for expert in experts:
        there = lines[expert.key].mean_abs
        if abs(there - expert.mean_abs) > _SAME_MODEL * max(there, expert.mean_abs):
            raise PlanError(
                f"{expert.key} has mean |weight| {there:g} there and {expert.mean_abs:g} in the "
                "checkpoint: it was measured on another model"
            )
    loss = np.array(
        [
            _loss(lines[key], roles if per_role else None)
            for key, roles in zip(items.keys, items.roles, strict=True)
        ]
    )
    power = exponent(rates, loss)
    smooth = all(line.flips_kl is not None for line in lines.values())
    if not smooth:
        loss = loss * _level(lines, items.keys, len(rates))
    facts: dict[str, Any] = {
        "loss_exponent": power,
        "experts_measured": sum(line.measured_kl is not None for line in lines.values()),
        "losses": "smooth part" if smooth else "whole",
    }
    return items, loss, facts


def from_study(
    rows: Sequence[Row],
    experts: Sequence[ExpertSizes],
    *,
    share: Mapping[ExpertKey, float] | None = None,
) -> tuple[Items, dict[str, Any]]:
    """Items with the losses of whole layers, divided among their experts.

    share: of routing, to divide by; equally if None. Layers that the study left out are taken for
    what lies between their neighbours. Raises PlanError as `curves_from_study`.
    """
    curves = curves_from_study(rows)
    items = Items.of(experts, per_role=False)
    measured = np.array(sorted(curves))
    by_layer = np.stack(
        [power_law(*_as_arrays(curves[layer]), items.rates)[0] for layer in measured.tolist()]
    )
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(by_layer, tiny))
    layers = np.array([key.layer for key in items.keys])
    loss = np.stack(
        [np.exp(np.interp(layers, measured, logs[:, r])) for r in range(len(items.rates))], axis=1
    )
    part = np.array([1.0 if share is None else share.get(key, 0.0) for key in items.keys])
    total = np.bincount(layers, part, layers.max() + 1)[layers]
    count = np.bincount(layers, minlength=layers.max() + 1)[layers]
    part = np.where(total > 0, part / np.where(total > 0, total, 1), 1 / count)
    return items.with_loss(loss * part[:, None]), {"study_layers": measured.tolist()}


def curves_from_study(
    rows: Sequence[Row], *, source: str = "bound"
) -> dict[int, dict[float, float]]:
    """Layer -> rate -> KL, the mean over seeds, of the conditions that change a whole layer.

    rows: others are passed over. source: the error source to take; if no row has it, the rows of
    whichever has most. Raises PlanError if none is left.
    """
    of_source: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for row in rows:
        kl = row.score.answer_kl_nats
        if row.layer is not None and row.rate is not None and math.isfinite(kl):
            name = row.source.removeprefix("codec:")
            of_source[name].append((row.layer, row.rate, kl))
    if not of_source:
        raise PlanError(
            "the study has no condition that changes a whole layer, with its KL: run a suite that "
            "has some (the paper's table 6), or measure with `moebound sensitivity`"
        )
    most = max(of_source, key=lambda name: len(of_source[name]))
    found: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer, rate, kl in of_source.get(source, of_source[most]):
        if rate > 0:
            found[layer][rate].append(kl)
    return {
        layer: {rate: float(np.mean(values)) for rate, values in sorted(curve.items())}
        for layer, curve in sorted(found.items())
    }


def shares_from_profile(document: Document, keys: Sequence[ExpertKey]) -> dict[ExpertKey, float]:
    """Each expert's share of its layer's routing, one selection added to each.

    Raises FormatError for a damaged profile, PlanError for a layer or expert that it lacks.
    """
    counts = profile.counts_by_layer(document)
    missing = [k for k in keys if k.layer not in counts or k.expert >= len(counts[k.layer])]
    if missing:
        raise PlanError(
            f"{document.path}: no counts of {_some(missing)}; is it another model's profile?"
        )
    return {
        key: (counts[key.layer][key.expert] + 1) / (sum(counts[key.layer]) + len(counts[key.layer]))
        for key in keys
    }


def _loss(line: ExpertLine, roles: tuple[str, ...] | None) -> Floats:
    """[M] predicted KL of an expert, or of some of its projections, without that of flips."""
    if roles is None:
        return _smooth(line)
    total = np.zeros(len(line.predicted_kl))
    for role in roles:
        # A checkpoint may keep in one matrix what the model's map has apart.
        for part in (role,) if role in line.by_role else HALVES.get(role, (role,)):
            if part not in line.by_role:
                raise PlanError(f"{line.key}: no {part!r} in by_role; plan a bound per expert")
            total += _smooth(line.by_role[part])
    return total


def _smooth(line: ExpertLine | RoleLine) -> Floats:
    loss = np.array(line.predicted_kl)
    return loss if line.flips_kl is None else np.maximum(loss - line.flips_kl, 0.0)


def _level(lines: Mapping[ExpertKey, ExpertLine], keys: Sequence[ExpertKey], count: int) -> Floats:
    """[N, M] measured over predicted KL, summed over the measured experts of each layer; 1 where
    none was."""
    sums: dict[int, Floats] = defaultdict(lambda: np.zeros((2, count)))
    for key, line in lines.items():
        if line.measured_kl is not None:
            sums[key.layer] += np.array([np.maximum(line.measured_kl, 0.0), line.predicted_kl])
    level = {
        layer: np.where((both > 0).all(axis=0), both[0] / np.where(both[1] > 0, both[1], 1), 1.0)
        for layer, both in sums.items()
    }
    return np.array([level.get(key.layer, np.ones(count)) for key in keys])


def _as_arrays(curve: Mapping[float, float]) -> tuple[Floats, Floats]:
    return np.array(list(curve)), np.array([list(curve.values())])


def _some(keys: Sequence[ExpertKey]) -> str:
    return f"{', '.join(map(str, keys[:5]))}{f' and {len(keys) - 5} more' if keys[5:] else ''}"
