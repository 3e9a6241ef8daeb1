"""What no policy can exceed, because it would have to know the future.

The game: before each visit the cache holds a set C; the visit asks for a set S, those of S that are
not in C are moved, and afterwards the cache holds some of C ∪ S within the budget. Every policy,
floor, pin and order of loading plays this game under further rules, so a bound on it is a bound on
them all.

**Experts of one size**: Belady's MIN (1966), keep those whose next use is nearest. Exactly optimal
in hits: exchange any kept expert for one that is needed sooner, and no visit has fewer hits. As
the game is stated, an expert may be used without being kept (a bypass), so this is a little above
what a cache can reach that must keep an expert while it is at work.

**Experts of different sizes**: the optimum is NP-hard. Instead, the resource bound ("PFOO-L") of
Berger, Beckmann and Harchol-Balter (Practical Bounds on Optimal Caching with Variable Object
Sizes, SIGMETRICS 2018): to have a hit, an expert has to be kept from its last use to this one,
which takes size × visits of the budget × all visits that there are. Granting the cheapest intervals
first, no matter when, can only give more hits than any cache has. Beside it stands what MIN's rule
reaches on the same trace: the optimum is between the two.

With one size but different bytes to load, hits are optimal and moved bytes come from the bound.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import numpy as np

from moebound.cache.results import Limit
from moebound.cache.visits import Visits
from moebound.types import Array


def limits(visits: Visits, budgets: list[int]) -> list[Limit]:
    """The limit at each budget, bytes."""
    catalog = visits.catalog
    following, since = _uses(visits)
    equal_loads = min(catalog.load_bytes) == max(catalog.load_bytes)
    asked_bytes = int(np.array(catalog.load_bytes)[visits.experts].sum())
    found = list[Limit]()
    for budget in budgets:
        planned = _farthest_first(visits, following, budget)
        if catalog.equal_sizes:
            hits: float = planned
        else:
            hits = _granted(visits, since, budget, np.ones(len(catalog)))
        if catalog.equal_sizes and equal_loads:
            kept_bytes: float = planned * catalog.load_bytes[0]
        else:
            kept_bytes = _granted(visits, since, budget, np.array(catalog.load_bytes, float))
        found.append(
            Limit(
                "belady" if catalog.equal_sizes else "space-time",
                budget,
                visits.n_accesses,
                hits,
                asked_bytes - kept_bytes,
                planned,
            )
        )
    return found


def _uses(visits: Visits) -> tuple[Array, Array]:
    """For each access, the next visit that uses the expert (the number of visits: none does), and
    how many visits ago the last one was (0: none did)."""
    n_visits = len(visits)
    visit_of = np.repeat(np.arange(n_visits), np.diff(visits.starts))
    order = np.argsort(visits.experts.astype(np.uint32), kind="stable")
    expert, visit = visits.experts[order], visit_of[order]
    again = expert[1:] == expert[:-1]
    following = np.full(len(order), n_visits)
    since = np.zeros(len(order), np.int64)
    following[order[:-1][again]] = visit[1:][again]
    since[order[1:][again]] = (visit[1:] - visit[:-1])[again]
    return following, since


def _farthest_first(visits: Visits, following: Array, budget: int) -> int:
    """Hits when those with the farthest next use are evicted until the rest fits."""
    n, never = len(visits.catalog), len(visits)
    sizes = visits.catalog.held_bytes
    next_use = [never] * n
    held = bytearray(n)
    farthest: list[int] = []  # -(next use · n + expert); entries are stale once next_use differs
    free, hits = budget, 0
    at = 0
    most = 4 * n + 1000
    for _, _, experts, _, _, _, _ in visits.walk():
        end = at + len(experts)
        for expert, following_use in zip(experts, following[at:end].tolist(), strict=True):
            next_use[expert] = following_use
            if held[expert]:
                hits += 1
                if following_use == never:
                    held[expert] = 0
                    free += sizes[expert]
                    continue
            elif following_use == never:
                continue
            else:
                held[expert] = 1
                free -= sizes[expert]
            heappush(farthest, -(following_use * n + expert))
        at = end
        while free < 0:
            use, expert = divmod(-heappop(farthest), n)
            if held[expert] and next_use[expert] == use:
                held[expert] = 0
                free += sizes[expert]
        if len(farthest) > most:
            farthest = [-(next_use[expert] * n + expert) for expert in range(n) if held[expert]]
            heapify(farthest)
    return hits


def _granted(visits: Visits, since: Array, budget: int, worth: Array) -> float:
    """The most that hits can be worth together (worth: by expert) within budget × visits."""
    reused = since > 0
    expert, duration = visits.experts[reused], since[reused]
    gain = worth[expert]
    cost = np.array(visits.catalog.held_bytes, float)[expert] * duration
    order = np.argsort(cost / gain, kind="stable")
    gain, spent = gain[order], np.cumsum(cost[order])
    room = float(budget) * (len(visits) - 1)
    whole = int(np.searchsorted(spent, room, side="right"))
    total = float(gain[:whole].sum())
    if whole < len(gain):
        before = spent[whole - 1] if whole else 0.0
        total += float(gain[whole] * (room - before) / (spent[whole] - before))
    return total
