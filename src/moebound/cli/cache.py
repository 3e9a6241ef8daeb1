"""`moebound cache simulate`: which policy to run with, and how far it is from the optimum."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moebound.cli import exits, wording
from moebound.cli.output import Output, output_options

if TYPE_CHECKING:
    from moebound.cache import Catalog, Simulation, Trace
    from moebound.cache.simulate import Report

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}  # fmt: skip

UNSIZED = 1000
"""Bytes of an expert where none are said: enough for a share of them to be exact."""

Budget = tuple[Literal["share", "bytes"], float]


class Budgets(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """Shares of all experts or sizes, separated by commas: "10%,4GiB"."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Budget]:
        if isinstance(value, list):
            return value
        found = list[Budget]()
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]I?B?|B?)\s*", part, re.IGNORECASE)
            amount = float(match[1]) if match else 0.0
            if match is None or not 0 < amount < 1e15 or (match[2] == "%" and amount > 100):
                self.fail(
                    f"{part!r} is no budget: expected a share of all experts, as 20%, or a size, "
                    "as 4GiB", param, ctx,
                )  # fmt: skip
            if match[2] == "%":
                found.append(("share", amount / 100))
            else:
                found.append(("bytes", amount * UNITS[match[2].upper().removesuffix("B")]))
        return found


class PolicyNames(click.ParamType):  # type: ignore[type-arg]  # generic since Click 8.5 only
    """Names of policies, separated by commas."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        from moebound.cache import POLICIES

        parts = value if isinstance(value, list) else [p.strip() for p in str(value).split(",")]
        for part in parts:
            if part not in POLICIES:
                self.fail(f"{part!r} is no policy: expected {', '.join(POLICIES)}", param, ctx)
        return parts


@click.group()
def cache() -> None:
    """Which experts to keep in memory: policies, compared on a trace of a model's routing."""


@cache.command()
@click.argument("trace")
@click.option("--store", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A store, for the size of each expert.")  # fmt: skip
@click.option("--held", type=click.Choice(["decoded", "encoded"]), default="decoded",
              show_default=True, help="What the cache has of a store's experts.")  # fmt: skip
@click.option("--expert-bytes", type=click.IntRange(min=1),
              help="Bytes of each expert, if there is no store.  [default: all alike]")  # fmt: skip
@click.option("--budgets", type=Budgets(), default="10%,20%,50%", show_default=True,
              help="Shares of all experts, or sizes: 20%,4GiB.")  # fmt: skip
@click.option("--policies", type=PolicyNames(), default=None, help="Which ones.  [default: all]")
@click.option("--floor", type=click.IntRange(min=0), default=1, show_default=True,
              help="Experts of a layer that other layers may not evict.")  # fmt: skip
@click.option("--one-by-one", is_flag=True,
              help="Replay texts that were recorded in batches one after the other.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=None,
              help="Processes.  [default: one a CPU, and one for short traces]")  # fmt: skip
@output_options
def simulate(
    output: Output,
    trace: str,
    store: Path | None,
    held: Literal["decoded", "encoded"],
    expert_bytes: int | None,
    budgets: list[Budget],
    policies: list[str] | None,
    floor: int,
    one_by_one: bool,
    jobs: int | None,
) -> int:
    """Replay TRACE through a cache of experts under every policy and budget.

    TRACE is a file of recorded routing (.npz), or "zipf" for a drawn one, with settings as in
    zipf:tokens=2000,exponent=0.8. An expert counts once a forward pass and layer. The limit is
    Belady's optimum, which knows the future; for experts of different sizes, a bound above it.
    """
    if store is not None and expert_bytes is not None:
        raise click.UsageError("--store and --expert-bytes both say sizes: give one of them")
    if store is None and held != "decoded":
        raise click.UsageError("--held goes with --store")
    if store is None and expert_bytes is None and any(kind == "bytes" for kind, _ in budgets):
        raise click.UsageError("a budget in bytes needs sizes: give --store or --expert-bytes")
    from moebound.cache import POLICIES
    from moebound.cache import one_by_one as separated
    from moebound.cache import simulate as run

    routing = separated(_trace(trace)) if one_by_one else _trace(trace)
    catalog = _catalog(routing, store, held, expert_bytes)
    sizes = [
        int(amount * catalog.total_bytes) if kind == "share" else int(amount)
        for kind, amount in budgets
    ]
    sized = store is not None or expert_bytes is not None
    with _progress(output) as report:
        found = run(
            routing,
            catalog,
            sizes,
            policies=policies or list(POLICIES),
            floor=floor,
            jobs=jobs,
            report=report,
        )
    output.result(
        {"trace": trace, "one_by_one": one_by_one, **found.to_json()},
        wording.facts(trace, _lines(found, sized)),
        wording.grid(*_table(found, sized)),
    )
    return exits.OK


def _trace(text: str) -> Trace:
    from moebound.cache import ZipfTrace, load_trace
    from moebound.cache.synthetic import NAME

    drawn = text.partition(":")[0] == NAME and not Path(text).exists()
    return ZipfTrace.parse(text).draw() if drawn else load_trace(Path(text))


def _catalog(
    trace: Trace, store: Path | None, held: Literal["decoded", "encoded"], n_bytes: int | None
) -> Catalog:
    from moebound.cache import Catalog, uniform

    if store is None:
        return uniform(trace, n_bytes or UNSIZED)
    from moebound.cli.verify import require_store
    from moebound.store import open_store

    require_store(store)
    return Catalog.of_store(open_store(store), held=held)


@contextlib.contextmanager
def _progress(output: Output) -> Iterator[Report | None]:
    if not output.shows_progress:
        yield None
        return
    bar = Progress(
        TextColumn("replaying {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=label
        )


def _lines(found: Simulation, sized: bool) -> list[tuple[str, str]]:
    each = "all of one size" if found.equal_sizes else "of different sizes"
    total = f", {wording.n_bytes(found.expert_bytes)}" if sized else ""
    limit = (
        "Belady's optimum" if found.equal_sizes
        else "a bound: no policy has more hits, and perhaps none can have as many"
    )  # fmt: skip
    accesses = found.limits[0].accesses
    return [
        ("trace", f"{found.model} {found.task}".strip() or "unnamed"),
        ("tokens", f"{found.n_tokens} in {found.n_steps} forward passes"),
        ("experts", f"{found.n_experts} {each}{total}"),
        ("asked for", f"{accesses} times, each once a pass and layer"),
        ("kept", f"{found.floor} a layer at least; {found.working} at work at a time"),
        ("limit", limit),
        ("fewest bytes moved", ", ".join(
            f"{_budget(found, b, sized)}: {found.best(b).policy}" for b in found.budgets)),
        ("a cell", "hit ratio, and its share of the limit's"),
    ]  # fmt: skip


def _table(found: Simulation, sized: bool) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(replay.policy for replay in found.replays))
    rows = [[name] for name in names]
    last = ["limit"]
    for limit in found.limits:
        for row, replay in zip(rows, found.at(limit.budget_bytes), strict=True):
            share = wording.percent(limit.share(replay), 1)
            row.append(f"{wording.percent(replay.hits, replay.accesses)}  {share:>7}")
        last.append(f"{wording.percent(limit.hits, limit.accesses)}  {'100.0 %':>7}")
    return ["policy", *(_budget(found, b, sized) for b in found.budgets)], [*rows, last]


def _budget(found: Simulation, budget: int, sized: bool) -> str:
    share = wording.percent(budget, found.expert_bytes)
    return f"{wording.n_bytes(budget)}, {share}" if sized else share
