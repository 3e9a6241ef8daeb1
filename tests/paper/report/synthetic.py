"""A study's folder, drawn: what a study would write if errors had the effects that a test wants."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SIMULATED = ("gaussian-sd", "gaussian-var", "gaussian-power", "uniform")
CODECS = ("codec:bound", "codec:sz3")
SOURCES = (*SIMULATED, *CODECS)
N_LAYERS = 26
READ_ONLY = {"ica": None, "pia": None, "valid": None, "right": None}
"""Of a condition whose problems are read, not answered."""
LAYERS = list(range(1, N_LAYERS + 1))
EASY, HARD = "wordmath", "wordmath-hard"


@dataclass(frozen=True)
class Place:
    """What a condition perturbs. depth: 0 the first MoE layer, 1 the last."""

    table: str
    task: str
    label: str
    selector: str
    layers: tuple[int, ...]
    rate: float | None
    n_experts: int
    answers: bool = True

    n_layers: int = N_LAYERS

    @property
    def depth(self) -> float:
        return (sum(self.layers) / len(self.layers) - 1) / (self.n_layers - 1)

    def of(self, n_layers: int) -> Place:
        """The same relative depth in a model with fewer layers."""
        scale = (n_layers - 1) / (N_LAYERS - 1)
        at = sorted({1 + round((layer - 1) * scale) for layer in self.layers})
        kind, _, place = self.selector.partition(":")
        selector = f"{kind}:{at[0]}" if kind == "layer" else f"{kind}:{at[0]}-{at[-1]} {place}"
        return replace(self, layers=tuple(at), selector=selector, n_layers=n_layers)


@dataclass(frozen=True)
class Effect:
    """What an error does. pia, ica: share of the right answers lost (below 0: share of the wrong
    ones gained). kl: nats, before the noise of the seed. valid: share of outputs with an answer."""

    pia: float = 0.0
    ica: float = 0.0
    kl: float = 1e-4
    valid: float = 1.0


Effects = Callable[[Place, str], Effect]


def places() -> Iterator[Place]:
    """The conditions of the paper's suite."""
    for rate in (0.1, 0.3, 0.5, 0.8, None):
        label = "L1 expert 0" + ("" if rate else " randomised")
        yield Place("3.2.1", EASY, label, "expert:1:0", (1,), rate, 1)
    for rate in (0.3, 0.5, 0.8):
        yield Place("3", EASY, "L1 most used", "most-used:1", (1,), rate, 1)
    for layer in (1, 13, 20, 26):
        yield Place("4", EASY, f"L{layer} most used", f"most-used:{layer}", (layer,), 0.8, 1)
    for layer in (1, 26):
        yield Place("5", EASY, f"L{layer} top 6", f"top:6:{layer}", (layer,), 0.8, 6)
    for layer in (1, 13, 20, 26):
        yield Place("6", EASY, f"L{layer} all", f"layer:{layer}", (layer,), 0.8, 64)
    groups = (("G1", 1, 10), ("G2", 9, 18), ("G3", 17, 26))
    for table, task, rates in (("7", EASY, (0.3, 0.5, 0.8)), ("9", HARD, (0.3, 0.5))):
        for rate in rates:
            for name, low, high in groups:
                layers = tuple(range(low, high + 1))
                yield Place(table, task, name, f"group:{low}-{high}", layers, rate, 10)
    for layer in (1, 13, 20, 26):
        yield Place("8", HARD, f"L{layer} most used", f"most-used:{layer}", (layer,), 0.8, 1)

    for layer in LAYERS:
        for rate in (0.3, 0.8):
            label = f"layer {layer}, all experts"
            yield Place("extra", EASY, label, f"layer:{layer}", (layer,), rate, 64, answers=False)


def no_effect(place: Place, source: str) -> Effect:
    return Effect()


def write_study(
    folder: Path,
    effects: Effects = no_effect,
    *,
    n: int = 500,
    seeds: int = 3,
    sources: tuple[str, ...] = SOURCES,
    keep: Callable[[Place], bool] = lambda place: True,
    model: str = "builtin:wordmath",
    label: Callable[[str], str] = lambda text: text,
    n_layers: int = N_LAYERS,
) -> Path:
    """Write study.json and rows.jsonl of a finished study and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    base = {
        task: {"pia": rng.random(n) < pia, "ica": rng.random(n) < ica}
        for task, pia, ica in ((EASY, 0.95, 0.92), (HARD, 0.7, 0.9))
    }
    for found in base.values():
        found["ica"] &= found["pia"]
    conditions: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for task in (EASY, HARD):
        conditions.append(_asked(f"baseline-{task}", "extra", "baseline", task))
        rows.append(_row(conditions[-1]["id"], task, "none", base[task], n, 1.0, layers=()))
    asked = filter(keep, places())
    for place in asked if n_layers == N_LAYERS else {place.of(n_layers): 0 for place in asked}:
        drawn = ("randomise",) if place.rate is None else sources
        for source in drawn:
            # The same noise for all seeds of a codec: it has none.
            for seed in range(1 if source in CODECS or not place.answers else seeds):
                effect = effects(place, source)
                right = _with(base[place.task], effect, rng)
                read = {} if place.answers else READ_ONLY
                name = f"{place.table}/{place.selector}/{place.rate}/{source}/{seed}/{place.task}"
                conditions.append(_asked(name, place.table, label(place.label), place.task))
                spread = float(np.exp(0.1 * rng.standard_normal()))
                rows.append(
                    _row(
                        name, place.task, source, right, n, effect.valid,
                        layers=place.layers, rate=place.rate, seed=seed, table=place.table,
                        selector=place.selector, kl=effect.kl * spread, experts=place.n_experts,
                    ) | read
                )  # fmt: skip
    document = {
        "format": "moebound.study", "version": 1, "model": model, "suite": "paper",
        "tasks": [EASY, HARD], "n_problems": n, "seeds": list(range(seeds)),
        "created": "2026-11-25T13:00:00Z", "conditions": conditions, "layers": LAYERS[:n_layers],
        "n_experts": 64,
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(document), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _asked(name: str, table: str, label: str, task: str) -> dict[str, Any]:
    return {"id": name, "table": table, "label": label, "task": task, "paper": None}


def _with(base: dict[str, Any], effect: Effect, rng: np.random.Generator) -> dict[str, Any]:
    """Right answers after an error: exactly the shares asked are lost or gained."""
    pia = _moved(base["pia"], effect.pia, rng)
    ica = _moved(base["ica"], effect.ica, rng) & pia
    return {"pia": pia, "ica": ica}


def _moved(right: Any, share: float, rng: np.random.Generator) -> Any:
    there = np.flatnonzero(right if share > 0 else ~right)
    chosen = rng.permutation(there)[: round(abs(share) * len(there))]
    moved = right.copy()
    moved[chosen] = share < 0
    return moved


def _row(
    name: str,
    task: str,
    source: str,
    right: dict[str, Any],
    n: int,
    valid: float,
    *,
    layers: tuple[int, ...],
    rate: float | None = None,
    seed: int = 0,
    table: str = "extra",
    selector: str = "",
    kl: float = 0.0,
    experts: int = 0,
) -> dict[str, Any]:
    codec = source in CODECS
    first = layers[0] if layers else 0
    behind = [0.0 if i < first else kl**0.5 * 0.97 ** (i - first) for i in range(N_LAYERS + 1)]
    routing = [0.0 if layer <= first else kl**0.5 / 2 for layer in LAYERS]
    return {
        "condition": name, "task": task, "table": table, "selector": selector,
        "experts_changed": experts, "layers": list(layers), "source": source, "rate": rate,
        "seed": seed, "n": n, "ica": int(right["ica"].sum()), "pia": int(right["pia"].sum()),
        "valid": round(valid * n), "right": {k: _hex(v) for k, v in right.items()},
        "kl": kl, "top1": 1 - min(1.0, kl), "n_positions": 40 * n,
        "realised": {
            "max_abs_error": 0.01, "rmse": 0.00577 if codec else 0.01,
            "beyond": 0.0 if codec else 0.32, "bits_per_weight": 3.1 if codec else None,
        } if layers else {},
        "where": {"residual": behind, "routing": routing} if layers else None,
        "seconds": 1.5,
    }  # fmt: skip


def _hex(right: Any) -> str:
    return hex(int.from_bytes(np.packbits(right, bitorder="little").tobytes(), "little"))[2:]
