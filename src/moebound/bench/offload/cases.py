"""Which runs there are, and how each is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebound.bench.environment import describe
from moebound.bench.offload.model import Shapes, make_checkpoint, make_store
from moebound.cache import ZipfTrace, load_trace, one_by_one, simulate, uniform
from moebound.errors import MoeboundError

FORMAT, VERSION = "moebound.bench.offload", 1

Say = Callable[[str, int, int], None]
"""Called with what is being run, runs done, and runs in all."""


@dataclass(frozen=True)
class Settings:
    """What to run. budgets: shares of all experts decoded. trace: a recorded one, or None for
    Zipf's. device: where to compute. peers: "stock" and "accelerate" too."""

    shapes: Shapes = field(default_factory=Shapes)
    rate: float = 0.3
    codec: str = "bound"
    budgets: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    tiers: tuple[str, ...] = ("disk", "ram")
    policies: tuple[str, ...] = ("hobbit",)
    predictors: tuple[str, ...] = ("none",)
    trace: Path | None = None
    prompt: int = 64
    warm: int = 16
    tokens: int = 48
    device: str = "cpu"
    peers: tuple[str, ...] = ("stock", "accelerate")
    timeout_s: float = 1800.0


@dataclass(frozen=True)
class Case:
    """One run. source: "raw" or "compressed"; how: as `measure` has it."""

    name: str
    how: str
    source: str
    tier: str | None = None
    budget: float | None = None
    policy: str | None = None
    predictor: str | None = None

    def options(self, settings: Settings) -> dict[str, Any]:
        """What `moebound.load`, or the peer, is called with."""
        if self.how != "offloaded":
            return {} if settings.device == "cpu" else {"device_map": settings.device}
        return {
            "ram_budget": f"{100 * (self.budget or 0):g}%",
            "tier": self.tier,
            "policy": self.policy,
            "predictor": self.predictor,
            "device": settings.device,
        }


@dataclass(frozen=True)
class OffloadReport:
    """rows: one a case, the case's fields and what `measure` found, or its error.

    policies: what the cache simulator says of this trace, one a budget: the policy that moves the
    fewest bytes, its hit ratio, and its share of the hits that are possible (Belady).
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    expert_bytes: dict[str, int]
    policies: list[dict[str, Any]]
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **vars(self)}


def cases(settings: Settings) -> Iterator[Case]:
    """All runs, raw and compressed next to each other."""
    for tier in settings.tiers:
        for budget in settings.budgets:
            for policy in settings.policies:
                for predictor in settings.predictors:
                    for source in ("raw", "compressed"):
                        # In RAM, raw experts beside decoded ones are everything twice.
                        if tier == "ram" and source == "raw" and settings.device == "cpu":
                            continue
                        yield Case(f"{source}, {tier}", "offloaded", source, tier, budget, policy,
                                   predictor)  # fmt: skip
    for peer in settings.peers:
        yield Case(peer, peer, "raw")


def run(settings: Settings, work: Path, *, say: Say | None = None) -> OffloadReport:
    """Make what is needed below `work`, and run every case in a process of its own."""
    raw = make_checkpoint(work / "raw", settings.shapes)
    store = work / f"store-{settings.codec.replace(':', '-')}-{settings.rate:g}"
    places = {"raw": raw, "compressed": make_store(raw, store, settings.rate, settings.codec)}
    trace = work / "trace.npz"
    if settings.trace is None:
        _zipf(settings).draw().save(trace)
    else:
        load_trace(settings.trace).save(trace)
    todo = list(cases(settings))
    rows = []
    for i, case in enumerate(todo):
        if say is not None:
            say(f"{case.name} {case.budget or ''}", i, len(todo))
        spec = {
            "how": case.how, "source": str(places[case.source]), "options": case.options(settings),
            "trace": str(trace), "top_k": settings.shapes.top_k, "prompt": settings.prompt,
            "warm": settings.warm, "tokens": settings.tokens, "vocab": settings.shapes.vocab,
            "drop_cache": case.tier != "ram", "device": settings.device,
        }  # fmt: skip
        rows.append({**asdict(case), **_run(spec, work, settings.timeout_s)})
    sizes = {name: _expert_bytes(place) for name, place in places.items()}
    plain = {**asdict(settings), "trace": str(settings.trace or _zipf(settings))}
    return OffloadReport(plain, describe(), sizes, _policies(trace, settings), rows)


def _policies(trace: Path, settings: Settings) -> list[dict[str, Any]]:
    """By budgets that hold something back; the least that a cache can work with is left out too."""
    found = one_by_one(load_trace(trace))
    catalog = uniform(found, 1)
    least = catalog.smallest_budget(floor=1, working=settings.shapes.top_k + 1)
    totals = {share: int(share * catalog.total_bytes) for share in settings.budgets if share < 1}
    budgets = {share: total for share, total in totals.items() if total >= least}
    if not budgets:
        return []
    simulated = simulate(found, catalog, list(budgets.values()), jobs=1,
                         working=settings.shapes.top_k + 1)  # fmt: skip
    rows = []
    for share, total in budgets.items():
        best = simulated.best(total)
        rows.append(
            {
                "budget": share,
                "policy": best.policy,
                "hit_ratio": best.hit_ratio,
                "share_of_limit": simulated.limit(total).share(best),
                "hit_ratios": {r.policy: r.hit_ratio for r in simulated.at(total)},
            }
        )
    return rows


def _zipf(settings: Settings) -> ZipfTrace:
    """One long text a run: prompts of the run's length are cut from it."""
    shapes = settings.shapes
    return ZipfTrace(layers=shapes.layers, experts=shapes.experts, top_k=shapes.top_k, tokens=2048,
                     sequences=4, prompt=settings.prompt)  # fmt: skip


def _run(spec: dict[str, Any], work: Path, timeout_s: float) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=work) as file:
        json.dump(spec, file)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "moebound.bench.offload.measure", file.name],
            capture_output=True, text=True, timeout=timeout_s, env=dict(os.environ), check=False,
        )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _expert_bytes(place: Path) -> int:
    from moebound.runtime.images import open_images

    try:
        return open_images(place).n_bytes
    except MoeboundError:
        return 0
