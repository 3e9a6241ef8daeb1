"""Experts with made-up but lawful sizes, and measurements written as other commands write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moebound.files.documents import Document, Format
from moebound.files.formats.sensitivity_map import SensitivityMap
from moebound.plan import RATES, ExpertSizes
from moebound.types import ExpertKey

BOUNDS = [0.1, 0.3, 0.5, 0.8]
ROLES = ("gate", "up", "down")


def experts(n_layers: int = 3, per_layer: int = 4, *, seed: int = 0) -> list[ExpertSizes]:
    """Sizes of about log2(4/rate) bits a weight, of 2,048 weights a matrix; ranks of 20 to 60."""
    rng = np.random.default_rng(seed)
    found = []
    for layer in range(1, n_layers + 1):
        for expert in range(per_layer):
            sizes = {
                role: 60 + (2048 / 8 * np.log2(1 + rng.uniform(3, 5) / RATES)).astype(np.int64)
                for role in ROLES
            }
            found.append(
                ExpertSizes(
                    ExpertKey(layer, expert), dict.fromkeys(ROLES, 2048), sizes,
                    3 * 2048 * 2, float(rng.uniform(0.01, 0.03)), float(rng.uniform(20, 60)),
                )
            )  # fmt: skip
    return found


def sensitivity(
    sizes: Sequence[ExpertSizes],
    *,
    power: float = 2.0,
    seed: int = 1,
    by_role: bool = False,
    measured: float | None = None,
) -> dict[str, Any]:
    """KL of c·rate^power with a c of each expert's own. measured: times what was predicted."""
    rng = np.random.default_rng(seed)
    entries = []
    for expert in sizes:
        c = float(np.exp(1.5 * rng.standard_normal())) * 1e-3
        kl = [c * rate**power for rate in BOUNDS]
        entry: dict[str, Any] = {
            "layer": expert.key.layer, "expert": expert.key.expert, "mean_abs": expert.mean_abs,
            "n_weights": sum(expert.n_weights.values()), "bytes": None, "predicted_kl": kl,
            "measured_kl": None if measured is None else [measured * value for value in kl],
        }  # fmt: skip
        if by_role:
            parts = {"gate": 0.1, "up": 0.3, "down": 0.6}
            entry["by_role"] = {
                role: {"mean_abs": expert.mean_abs, "bytes": None,
                       "predicted_kl": [part * value for value in kl]}
                for role, part in parts.items()
            }  # fmt: skip
        entries.append(entry)
    return {
        "format": "moebound.sensitivity", "version": 1, "model": "tiny", "task": "wordmath",
        "n_prompts": 4, "n_positions": 100, "codec": "bound", "bounds": BOUNDS,
        "experts": entries,
    }  # fmt: skip


def profile(sizes: Sequence[ExpertSizes], *, seed: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    layers = sorted({expert.key.layer for expert in sizes})
    each = len(sizes) // len(layers)
    return {
        "format": "moebound.profile", "version": 1,
        "layers": [
            {"layer": layer, "counts": rng.integers(0, 200, each).tolist()} for layer in layers
        ],
    }  # fmt: skip


def as_document(content: dict[str, Any], folder: Path) -> Document:
    path = folder / f"{content['format']}.json"
    path.write_text(json.dumps(content))
    return Format(content["format"], 1).read(path)


def as_map(content: dict[str, Any], folder: Path) -> SensitivityMap:
    return SensitivityMap.of(as_document(content, folder))
