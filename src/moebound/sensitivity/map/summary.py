"""From finished rows to a map: what the predictions are worth, and what they took."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moebound.evaluate.calibration import Calibration
from moebound.files.formats.sensitivity_map import ExpertLine, SensitivityMap
from moebound.score.record import Score, Tokens, finite
from moebound.sensitivity.map.predict import Response
from moebound.sensitivity.map.ranks import rank_correlation
from moebound.sensitivity.map.settings import MapSettings

Row = Mapping[str, Any]


def assemble(
    model: str,
    task: str,
    calibration: Calibration,
    settings: MapSettings,
    rows: Sequence[Row],
    response: Response,
    *,
    skip: int | None = None,
) -> SensitivityMap:
    """rows: one of kind "ties", one of kind "layer" for each experts module, one of kind "joint"
    for each rate, in any order."""
    layers = sorted((row for row in rows if row["kind"] == "layer"), key=lambda row: row["place"])
    n_rates = len(settings.rates)
    experts = tuple(ExpertLine.from_json(e, n_rates) for row in layers for e in row["experts"])
    together = {row["rate"]: row for row in rows if row["kind"] == "joint"}
    joint = _joint(
        experts, layers, settings, response, [together[rate] for rate in settings.rates],
        calibration.tokens,
    )  # fmt: skip
    [ties] = [row for row in rows if row["kind"] == "ties"]
    checks = _quality(experts, n_rates) | _speed(ties, layers, experts, settings)
    return SensitivityMap(
        model, task, calibration.n_sequences, calibration.n_positions, settings.codec,
        settings.rates, experts, joint, checks | {"settings": settings.to_json()},
        skip, calibration.tokens,
    )  # fmt: skip


def _joint(
    experts: Sequence[ExpertLine],
    layers: Sequence[Row],
    settings: MapSettings,
    response: Response,
    rows: Sequence[Row],
    tokens: Tokens,
) -> dict[str, Any]:
    """rows: one for each rate. A `measured_kl` of None: the model said nothing any more."""
    scores = [  # rows of an earlier version have no more than KL
        Score.from_json(row.get("score", {"answer_kl_nats": row["kl"]})) for row in rows
    ]
    measured = [score.kl(tokens)[0] for score in scores]
    alone = np.array([line.predicted_kl for line in experts]).sum(0)
    slopes = sum(_unpacked(row["slopes"]) for row in layers)  # [R, G, N]
    assert isinstance(slopes, torch.Tensor)
    smooth = response.smooth(slopes[:, :, None])[:, 0]
    flips = response.flips(slopes[:, :, None])[:, 0]
    return {
        "bounds": list(settings.rates),
        "predicted_kl": (smooth + flips).tolist(),
        "flips_kl": flips.tolist(),
        "sum_of_experts_kl": alone.tolist(),
        "measured_kl": [finite(value) for value in measured],
        "scores": [score.to_json() for score in scores],
        "measured_over_predicted": _ratios(measured, (smooth + flips).tolist()),
        "measured_over_sum": _ratios(measured, alone.tolist()),
    }


def _quality(experts: Sequence[ExpertLine], n_rates: int) -> dict[str, Any]:
    known = [(line.predicted_kl, line.measured_kl) for line in experts if line.measured_kl]
    by_bound = [
        rank_correlation([p[r] for p, _ in known], [m[r] for _, m in known if m])
        for r in range(n_rates)
    ]
    usable = [value for value in by_bound if value is not None]
    predicted = np.array([p for p, _ in known]).reshape(-1, n_rates).sum(0)
    found = np.array([m for _, m in known]).reshape(-1, n_rates).sum(0)
    return {
        "method": "Fisher information, and measured costs of routing flips",
        "rank_correlation": min(usable) if usable else None,
        "rank_correlation_by_bound": by_bound,
        "n_sampled": len(known),
        "measured_over_predicted": _ratios(found.tolist(), predicted.tolist()) if known else None,
    }


def _speed(
    ties: Row, layers: Sequence[Row], experts: Sequence[ExpertLine], settings: MapSettings
) -> dict[str, Any]:
    """Against a pass of the whole model for each expert at each rate, timed in the same run: CPU
    seconds of all threads on a CPU, else seconds."""
    naive = [entry for row in layers for entry in row["naive"]]
    each = float(np.mean([entry["seconds"] for entry in naive]))
    predicted = float(ties["seconds"] + sum(row["predicted_in"] for row in layers))
    measured = float(sum(row["measured_in"] for row in layers))
    n_measured = sum(line.measured_kl is not None for line in experts) * len(settings.rates)
    total = each * len(experts) * len(settings.rates)
    off = [
        abs(entry["kl"] - entry["sweep_kl"]) / max(abs(entry["kl"]), 1e-12)
        for entry in naive
        if entry["sweep_kl"] is not None and entry["kl"] is not None
    ]
    return {
        "speedup_vs_naive": total / predicted,
        "sweep_speedup_vs_naive": each * n_measured / measured if n_measured else None,
        "predicted_in_s": predicted,
        "measured_in_s": measured if n_measured else None,
        "naive_s_each": each,
        "n_naive": len(naive),
        "sweep_off_naive": max(off, default=None),
    }


def _ratios(measured: Sequence[float], predicted: Sequence[float]) -> list[float | None]:
    return [finite(m / p) if p > 0 else None for m, p in zip(measured, predicted, strict=True)]


def _unpacked(packed: Mapping[str, Any]) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(packed["float32"]), np.float32)
    return torch.from_numpy(values.copy()).view(*packed["shape"])


def packed(values: torch.Tensor) -> dict[str, Any]:
    """Numbers for a row, in float32."""
    data = values.float().contiguous().numpy().tobytes()
    return {"shape": list(values.shape), "float32": base64.b64encode(data).decode("ascii")}
