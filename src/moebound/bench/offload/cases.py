"""Which runs there are, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moebound.bench.environment import describe
from moebound.bench.offload.gguf_quantized import gguf_sizes
from moebound.bench.offload.launch import launch
from moebound.bench.offload.memory_limit import memory_group
from moebound.bench.offload.prepare import Prepared, prepare
from moebound.bench.offload.report import OffloadReport
from moebound.bench.offload.settings import LLAMA, OffloadSettings
from moebound.cache import load_trace, simulate, uniform
from moebound.errors import MoeboundError

Say = Callable[[str, int, int], None]
"""Called with what is being run, runs done, and runs in all."""

_PACKAGES = ("transformers", "accelerate", "llama_cpp_python", "gguf")


@dataclass(frozen=True)
class Case:
    """One run. source: "raw" or "compressed"; how: as `measure` has it; routing: "forced" by the
    trace, or the model's "own". others: the rate of all that is no expert's, or "keep" for weights
    as they are. quantized, mapped: the file that llama.cpp runs
    (`LlamaFile`)."""

    name: str
    how: str
    source: str
    routing: str
    tier: str | None = None
    budget: float | None = None
    policy: str | None = None
    predictor: str | None = None
    slots: str = "values"
    linears: str = "values"
    others: float | str = "keep"
    quantized: str | None = None
    mapped: bool = False

    def options(self, settings: OffloadSettings) -> dict[str, Any]:
        """What `moebound.load`, or the peer, is called with."""
        if self.how == LLAMA:
            return {"mapped": self.mapped}
        if self.how not in ("offloaded", "clients"):
            return {} if settings.device == "cpu" else {"device_map": settings.device}
        return {
            "ram_budget": f"{100 * (self.budget or 0):g}%",
            "tier": self.tier,
            "policy": self.policy,
            "predictor": self.predictor,
            "slots": self.slots,
            "linears": self.linears,
            "device": settings.device,
        }


def cases(settings: OffloadSettings) -> Iterator[Case]:
    """All runs, raw and compressed next to each other."""
    for routing in settings.routing:
        suffix = ", own routing" if routing == "own" else ""
        for tier in settings.tiers:
            for budget in settings.budgets:
                for policy in settings.policies:
                    for predictor in settings.predictors:
                        for source in ("raw", "compressed"):
                            # Raw experts beside decoded ones are everything twice.
                            twice = tier == "device" or (tier == "ram" and settings.device == "cpu")
                            if source == "raw" and twice:
                                continue
                            for slots, linears in _holding(settings, source):
                                end = suffix + ("" if slots == "values" else f", slots {slots}")
                                others: float | str = "keep"
                                if linears != "values":
                                    end += f", linear layers {linears}"
                                    others = settings.others
                                place = (source, routing, tier, budget, policy, predictor, slots,
                                         linears, others)  # fmt: skip
                                yield Case(f"{source}, {tier}{end}", "offloaded", *place)
                                if settings.clients > 1:
                                    name = f"{source}, {tier}, {settings.clients} clients{end}"
                                    yield Case(name, "clients", *place)
        for peer in settings.peers:
            if peer in ("stock", "accelerate"):
                yield Case(peer + suffix, peer, "raw", routing)
    for file in settings.llama_files:
        name = f"{file.name}, own routing"
        yield Case(name, LLAMA, "raw", "own", quantized=file.kind, mapped=file.mapped)


def _holding(settings: OffloadSettings, source: str) -> Iterator[tuple[str, str]]:
    """What slots and linear layers hold, of each run of a source."""
    if source == "raw":
        return iter([("values", "values")])
    return product(settings.slots, settings.linears)


def run(settings: OffloadSettings, work: Path, *, say: Say | None = None) -> OffloadReport:
    """Make what is needed below `work`, and run every case in a process of its own.

    A case that fails is a row with its error. Raises BackendUnavailable, before anything is made,
    where a memory limit is asked for and none can be set; else as `prepare`.
    """
    if settings.memory_limit is not None:
        with memory_group(settings.memory_limit):
            pass
    prepared = prepare(settings, work)
    todo = list(cases(settings))
    sizes = {"raw": _expert_bytes(prepared.raw), "compressed": _expert_bytes(prepared.store)}
    # A file that others are made from is as large as the checkpoint: gone, if nobody asked for it.
    asked = any(file.kind is None for file in settings.llama_files)
    passing = not asked and not prepared.gguf.exists()
    rows = []
    try:
        for i, case in enumerate(todo):
            if say is not None:
                say(f"{case.name} {case.budget or ''}", i, len(todo))
            n_bytes, n_weights = sizes[case.source]
            known = n_weights and case.quantized is None  # others' sizes come with their file
            bits = {"expert_bits": 8 * n_bytes / n_weights} if known else {}
            rows.append({**asdict(case), **bits, **_row(case, settings, prepared, work)})
    finally:
        if passing:
            prepared.gguf.unlink(missing_ok=True)
    policies = [] if prepared.trace is None else _policies(prepared.trace, prepared.top_k, settings)
    plain = asdict(settings) | {"trace": prepared.routed_by}
    if settings.model is not None:
        del plain["shapes"]
    found = {source: size for source, (size, _) in sizes.items()}
    return OffloadReport(plain, describe(*_PACKAGES), found, policies, rows)


def _row(case: Case, settings: OffloadSettings, prepared: Prepared, work: Path) -> dict[str, Any]:
    try:
        source = prepared.place(case.how, case.source, case.quantized, case.linears)
        sizes = gguf_sizes(source) if case.how == LLAMA else None
    except MoeboundError as error:
        return {"error": str(error)}
    spec = {
        "how": case.how, "source": str(source), "options": case.options(settings),
        "trace": str(prepared.trace) if case.routing == "forced" else None,
        "top_k": prepared.top_k, "ids": str(prepared.ids), "prompt": settings.prompt,
        "warm": settings.warm, "tokens": settings.tokens,
        "drop_cache": case.tier not in ("ram", "device"),
        "device": settings.device, "clients": settings.clients,
    }  # fmt: skip
    row = launch(spec, work, timeout_s=settings.timeout_s, memory_limit=settings.memory_limit)
    return row if sizes is None else asdict(sizes) | row


def _policies(trace: Path, top_k: int, settings: OffloadSettings) -> list[dict[str, Any]]:
    """By budgets that hold something back; the least that a cache can work with is left out too."""
    found = load_trace(trace)
    catalog = uniform(found, 1)
    least = catalog.smallest_budget(floor=1, working=top_k + 1)
    totals = {share: int(share * catalog.total_bytes) for share in settings.budgets if share < 1}
    budgets = {share: total for share, total in totals.items() if total >= least}
    if not budgets:
        return []
    simulated = simulate(found, catalog, list(budgets.values()), jobs=1, working=top_k + 1)
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


def _expert_bytes(place: Path) -> tuple[int, int]:
    """Of all experts as they are stored, and their weights; 0 where they cannot be read."""
    from moebound.offload.entries import open_entries

    try:
        entries = open_entries(place)
    except MoeboundError:
        return 0, 0
    return entries.n_bytes, entries.n_weights
