"""Replay a routing trace through a cache, under every policy and budget asked.

The replay is the live cache's own bookkeeping (residency.py and the policies), without weights.
For each forward pass and layer, in order:

1. the policy sees the visit;
2. experts that are resident are hits, and stay pinned while they are at work;
3. the others are loaded. If all experts of the visit fit into the working set, all are pinned until
   the layer is done. If not (a prefill that uses most of a layer) the visit streams: hits first,
   then the rest two at a time, one computing while the next is loaded; each may be evicted as soon
   as it is computed.

What is not in it: time, prefetch, and the order in which two threads might get hold of the lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from moebound.cache.belady import limits
from moebound.cache.catalog import Catalog
from moebound.cache.policies import POLICIES, Policy, make_policy
from moebound.cache.residency import Residency
from moebound.cache.results import LayerCount, Limit, Replay, Simulation
from moebound.cache.visits import Trace, Visits
from moebound.errors import CacheError

DEFAULT_FLOOR = 1
_WORTH_A_PROCESS = 5_000_000  # accesses; some seconds, against one or two for a process to begin

Report = Callable[[int, int, str], None]
"""Called with replays done, replays in all, and what was done last."""


@dataclass(frozen=True)
class Choice:
    """The policy to run with. margin: bytes moved by LRU, over those moved by it."""

    policy: str
    replay: Replay
    limit: Limit
    margin: float


def simulate(
    trace: Trace,
    catalog: Catalog,
    budgets: Sequence[int],
    *,
    policies: Sequence[str] = tuple(POLICIES),
    floor: int = DEFAULT_FLOOR,
    working: int | None = None,
    jobs: int | None = None,
    report: Report | None = None,
) -> Simulation:
    """Every policy at every budget (bytes), and the limit at each.

    floor, working: as in `Residency`; by default one expert a layer is kept, and a token's experts
    and one more are the working set. jobs: processes; None for the CPUs, and one where the
    replays are short. The result does not depend on it.
    Raises CacheError for no budget or policy, a policy that is not known, a budget that is too
    small, and a trace whose experts are not in the catalog. Budgets above the experts' total are
    all the same to a cache, and allowed.
    """
    if not budgets or not policies:
        raise CacheError("nothing to simulate: expected at least one budget and one policy")
    for name in policies:
        make_policy(name)
    visits = Visits.of_trace(trace, catalog)
    working = visits.top_k + 1 if working is None else working
    for budget in budgets:
        catalog.check_budget(budget, floor=floor, working=working)
    budgets, policies = list(dict.fromkeys(budgets)), list(dict.fromkeys(policies))
    tasks = [(name, budget, floor, working) for budget in budgets for name in policies]
    if jobs is None:
        jobs = min(os.cpu_count() or 1, len(tasks))
        jobs = jobs if visits.n_accesses * len(tasks) > _WORTH_A_PROCESS * jobs else 1
    replays, bounds = _run(visits, tasks, budgets, jobs, report)
    return Simulation(
        model=trace.model,
        task=trace.task,
        n_tokens=visits.n_tokens,
        n_steps=visits.n_steps,
        n_visits=len(visits),
        n_experts=len(catalog),
        expert_bytes=catalog.total_bytes,
        equal_sizes=catalog.equal_sizes,
        floor=floor,
        working=working,
        replays=tuple(replays),
        limits=tuple(bounds),
    )


def choose_policy(
    trace: Trace, catalog: Catalog, budget_bytes: int, *, floor: int = DEFAULT_FLOOR
) -> Choice:
    """The policy that moves the fewest bytes on this trace at this budget. Raises as `simulate`."""
    found = simulate(trace, catalog, [budget_bytes], floor=floor)
    best = found.best(budget_bytes)
    [lru] = [replay for replay in found.replays if replay.policy == "lru"]
    return Choice(best.policy, best, found.limits[0], lru.moved_bytes / max(best.moved_bytes, 1))


def replay(
    visits: Visits, policy: Policy, budget_bytes: int, *, floor: int, working: int
) -> Replay:
    """One policy at one budget."""
    catalog = visits.catalog
    residency = Residency(catalog, budget_bytes, policy, floor=floor, working=working)
    resident, pins, load_bytes = residency.resident, residency.pins, catalog.load_bytes
    use = policy.use
    n_layers = len(catalog.layers)
    counts = [[0, 0, 0] for _ in range(2 * n_layers)]  # accesses, hits, bytes; decode ones behind
    evictions = 0
    for step, place, experts, tokens, leading, decode, fresh in visits.walk():
        if fresh:
            residency.begin_sequence()
        missing = [expert for expert in experts if not resident[expert]]
        use(step, place, experts, tokens, leading)
        count = counts[place + n_layers if decode else place]
        count[0] += len(experts)
        count[1] += len(experts) - len(missing)
        if not missing:
            continue
        for expert in missing:
            count[2] += load_bytes[expert]
        if len(experts) > working:  # streams
            evictions += _stream(residency, missing, place)
        elif len(missing) == len(experts):
            evictions += _brought(residency.bring(missing, place))
        else:
            for expert in experts:
                pins[expert] = 1
            evictions += _brought(residency.bring(missing, place))
            for expert in experts:
                pins[expert] = 0
    return _counted(policy.name, budget_bytes, catalog, counts, evictions)


def _stream(residency: Residency, missing: list[int], place: int) -> int:
    """Two at a time. How many were evicted."""
    evictions, before = 0, missing[0]
    for expert in missing:
        evictions += _brought(residency.bring([expert], place))
        residency.pins[before] = 0
        residency.pins[expert] = 1
        before = expert
    residency.pins[before] = 0
    return evictions


def _brought(evicted: int | None) -> int:
    if evicted is None:
        raise CacheError("no room in a budget that was checked: a policy broke its contract")
    return evicted


def _counted(
    policy: str, budget_bytes: int, catalog: Catalog, counts: list[list[int]], evictions: int
) -> Replay:
    n_layers = len(catalog.layers)
    mixed, decode = counts[:n_layers], counts[n_layers:]
    layers = tuple(
        LayerCount(layer, *(a + b for a, b in zip(one, other, strict=True)))
        for layer, one, other in zip(catalog.layers, mixed, decode, strict=True)
    )
    decoded = [sum(column) for column in zip(*decode, strict=True)]
    return Replay(
        policy,
        budget_bytes,
        sum(layer.accesses for layer in layers),
        sum(layer.hits for layer in layers),
        sum(layer.moved_bytes for layer in layers),
        decoded[0],
        decoded[1],
        decoded[2],
        evictions,
        layers,
    )


Task = tuple[str, int, int, int]
"""policy, budget, floor, working."""

_visits: Visits
"""What a process of the pool works on: sent once, not with every task."""


def _begin(visits: Visits) -> None:
    global _visits
    _visits = visits


def _replay_task(task: Task) -> Replay:
    name, budget, floor, working = task
    return replay(_visits, make_policy(name), budget, floor=floor, working=working)


def _limit_task(budget: int) -> Limit:
    return limits(_visits, [budget])[0]


def _run(
    visits: Visits, tasks: list[Task], budgets: list[int], jobs: int, report: Report | None
) -> tuple[list[Replay], list[Limit]]:
    total = len(tasks) + len(budgets)
    labels = [f"{name} {budget}" for name, budget, _, _ in tasks] + [f"limit {b}" for b in budgets]
    done = 0

    def tell(at: int) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done, total, labels[at])

    if jobs == 1:
        replays, bounds = list[Replay](), list[Limit]()
        for name, budget, floor, working in tasks:
            policy = make_policy(name)
            replays.append(replay(visits, policy, budget, floor=floor, working=working))
            tell(len(replays) - 1)
        for budget in budgets:
            bounds += limits(visits, [budget])
            tell(len(tasks) + len(bounds) - 1)
        return replays, bounds
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (visits,)) as pool:
        waiting = [pool.submit(_replay_task, task) for task in tasks]
        bounding = [pool.submit(_limit_task, budget) for budget in budgets]
        every: list[Future[Any]] = [*waiting, *bounding]
        places = {future: at for at, future in enumerate(every)}
        for future in as_completed(places):
            future.result()
            tell(places[future])
        return [future.result() for future in waiting], [future.result() for future in bounding]
