"""Predicted loss of each item at each rate, from what was measured: a sensitivity map or a study.

Measurements are at a few rates, plans at 25. Between two measured rates loss is taken for a power
of the rate; beyond them for its square, which is what second-order (Fisher) theory says of small
errors, and above the widest is on the safe side. `exponent` says what power the data have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moebound.checkpoint.families import HALVES
from moebound.errors import PlanError
from moebound.files.documents import Document, index, number, numbers
from moebound.plan.items import ExpertSizes, Floats, Items
from moebound.types import ExpertKey

SENSITIVITY_FORMAT, SENSITIVITY_VERSION = "moebound.sensitivity", 1
PROFILE_FORMAT, PROFILE_VERSION = "moebound.profile", 1

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
    document: Document, experts: Sequence[ExpertSizes], *, per_role: bool
) -> tuple[Items, dict[str, Any]]:
    """Items with the losses of a sensitivity map, and what a plan should say about them.

    Of a map that says which part of a loss comes from routers that change their mind (`flips_kl`),
    the other part is taken: flips do not add up (a near tie flips once, and each expert that could
    flip it is charged for it), so a plan that believes them spends its bytes in the wrong places.
    Of a map that does not, predictions are brought to the level of what was measured, on all
    experts or a sample, layer by layer and rate by rate.
    Raises PlanError for fields that are wrong, an expert that is missing, another model.
    """
    content, where = document.content, str(document.path)
    rates = _ascending(content.get("bounds"), f"{where}: bounds")
    entries = _entries(content.get("experts"), where)
    items = Items.of(experts, per_role=per_role)
    by_key = {expert.key: expert for expert in experts}
    missing = [key for key in by_key if key not in entries]
    if missing:
        raise PlanError(f"{where}: no sensitivity of {_some(missing)}; was it another model?")
    for key, expert in by_key.items():
        found = number(entries[key].get("mean_abs"), f"{where}: {key}: mean_abs")
        if abs(found - expert.mean_abs) > _SAME_MODEL * max(found, expert.mean_abs):
            raise PlanError(
                f"{where}: {key} has mean |weight| {found:g} there and {expert.mean_abs:g} in the "
                "checkpoint: it was measured on another model"
            )
    loss = np.array(
        [
            _loss(entries[key], roles if per_role else None, len(rates), f"{where}: {key}")
            for key, roles in zip(items.keys, items.roles, strict=True)
        ]
    )
    power = exponent(rates, loss)
    smooth = all("flips_kl" in entry for entry in entries.values())
    if not smooth:
        loss = loss * _level(entries, items.keys, len(rates), where)
    facts: dict[str, Any] = {
        "sensitivity": document.describe(),
        "loss_exponent": power,
        "experts_measured": sum(e.get("measured_kl") is not None for e in entries.values()),
        "losses": "smooth part" if smooth else "whole",
    }
    return items.with_loss(power_law(rates, loss, items.rates)), facts


def from_study(
    rows: Sequence[Mapping[str, Any]],
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
    rows: Sequence[Mapping[str, Any]], *, source: str = "bound"
) -> dict[int, dict[float, float]]:
    """Layer -> rate -> KL, the mean over seeds, of the conditions that change a whole layer.

    rows: those with `layer`, `source`, `rate` and `kl`; others are of other conditions and passed
    over. source: the error source to take; if no row has it, the rows of whichever has most.
    Raises PlanError if none is left.
    """
    usable = [
        row for row in rows
        if {"layer", "source", "rate", "kl"} <= row.keys() and row["kl"] is not None
    ]  # fmt: skip
    of_source: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in usable:
        of_source[str(row["source"]).removeprefix("codec:")].append(row)
    if not of_source:
        raise PlanError(
            "the study has no condition that changes a whole layer, with its KL: run a suite that "
            "has some (the paper's table 6), or measure with `moebound sensitivity`"
        )
    most = max(of_source, key=lambda name: len(of_source[name]))
    found: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in of_source.get(source, of_source[most]):
        layer = index(row["layer"], "a study's row: layer")
        rate = number(row["rate"], f"a study's row of layer {layer}: rate")
        if rate > 0:
            found[layer][rate].append(max(0.0, float(row["kl"])))
    return {
        layer: {rate: float(np.mean(values)) for rate, values in sorted(curve.items())}
        for layer, curve in sorted(found.items())
    }


def shares_from_profile(document: Document, keys: Sequence[ExpertKey]) -> dict[ExpertKey, float]:
    """Each expert's share of its layer's routing, one selection added to each.

    Raises PlanError for a layer or expert that the profile lacks.
    """
    where, counts = str(document.path), dict[int, list[float]]()
    layers = document.content.get("layers")
    if not isinstance(layers, list):
        raise PlanError(f"{where}: layers: expected a list, found {type(layers).__name__}")
    for entry in layers:
        if not isinstance(entry, dict):
            raise PlanError(f"{where}: layers: expected objects, found {str(entry)[:40]}")
        layer = index(entry.get("layer"), f"{where}: layer")
        counts[layer] = numbers(entry.get("counts"), None, f"{where}: layer {layer}: counts")
    missing = [k for k in keys if k.layer not in counts or k.expert >= len(counts[k.layer])]
    if missing:
        raise PlanError(f"{where}: no counts of {_some(missing)}; is it another model's profile?")
    return {
        key: (counts[key.layer][key.expert] + 1) / (sum(counts[key.layer]) + len(counts[key.layer]))
        for key in keys
    }


def _ascending(value: Any, what: str) -> Floats:
    rates = np.array(numbers(value, None, what))
    if (np.diff(rates) <= 0).any() or rates[0] <= 0:
        raise PlanError(f"{what}: expected ascending numbers above 0, found {rates.tolist()}")
    return rates


def _entries(value: Any, where: str) -> dict[ExpertKey, Mapping[str, Any]]:
    if not isinstance(value, list):
        raise PlanError(f"{where}: experts: expected a list, found {type(value).__name__}")
    found: dict[ExpertKey, Mapping[str, Any]] = {}
    for entry in value:
        if not isinstance(entry, dict):
            raise PlanError(f"{where}: experts: expected objects, found {str(entry)[:40]}")
        layer = index(entry.get("layer"), f"{where}: layer")
        expert = index(entry.get("expert"), f"{where}: layer {layer}: expert")
        found[ExpertKey(layer, expert, bool(entry.get("shared", False)))] = entry
    return found


def _loss(
    entry: Mapping[str, Any], roles: tuple[str, ...] | None, count: int, where: str
) -> Floats:
    """[M] predicted KL of an expert, or of some of its projections, without that of flips."""
    if roles is None:
        return _smooth(entry, count, where)
    by_role, total = entry.get("by_role") or {}, np.zeros(count)
    for role in roles:
        # A checkpoint may keep in one matrix what the model's map has apart.
        for part in (role,) if role in by_role else HALVES.get(role, (role,)):
            if part not in by_role:
                raise PlanError(f"{where}: by_role: no {part!r}; plan a bound per expert instead")
            total += _smooth(by_role[part], count, f"{where}: by_role: {part}")
    return total


def _smooth(entry: Mapping[str, Any], count: int, where: str) -> Floats:
    loss = np.array(numbers(entry.get("predicted_kl"), count, f"{where}: predicted_kl"))
    if entry.get("flips_kl") is None:
        return loss
    return np.maximum(loss - numbers(entry["flips_kl"], count, f"{where}: flips_kl"), 0.0)


def _level(
    entries: Mapping[ExpertKey, Mapping[str, Any]],
    keys: Sequence[ExpertKey],
    count: int,
    where: str,
) -> Floats:
    """[N, M] measured over predicted KL, summed over the measured experts of each layer; 1 where
    none was."""
    sums: dict[int, Floats] = defaultdict(lambda: np.zeros((2, count)))
    for key, entry in entries.items():
        if entry.get("measured_kl") is None:
            continue
        sums[key.layer][0] += [max(0.0, float(v)) for v in entry["measured_kl"]]
        sums[key.layer][1] += numbers(entry.get("predicted_kl"), count, f"{where}: {key}")
    level = {
        layer: np.where((both > 0).all(axis=0), both[0] / np.where(both[1] > 0, both[1], 1), 1.0)
        for layer, both in sums.items()
    }
    return np.array([level.get(key.layer, np.ones(count)) for key in keys])


def _as_arrays(curve: Mapping[float, float]) -> tuple[Floats, Floats]:
    return np.array(list(curve)), np.array([list(curve.values())])


def _some(keys: Sequence[ExpertKey]) -> str:
    return f"{', '.join(map(str, keys[:5]))}{f' and {len(keys) - 5} more' if keys[5:] else ''}"
