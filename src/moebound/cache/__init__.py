"""Stop 6 of the walk: which experts are resident.

    catalog = Catalog.of_store(store)                            # what each expert weighs
    simulation = simulate(load_trace(path), catalog, [budget])   # every policy, and the limit
    cache = ExpertCache(catalog, budget, policy=simulation.best(budget).policy, working=top_k + 1)

docs/cache.md has the policies, and what the figures mean.
"""

from moebound.cache.cache import ExpertCache
from moebound.cache.catalog import Catalog
from moebound.cache.claim import CacheStats, Claim, Found
from moebound.cache.policies import POLICIES, Policy, make_policy
from moebound.cache.results import LayerCount, Limit, Replay, Simulation
from moebound.cache.simulate import Choice, choose_policy, simulate
from moebound.cache.synthetic import ZipfTrace
from moebound.cache.trace import LayerTrace, Trace, load_trace
from moebound.cache.visits import Visits, gather, one_by_one, uniform

__all__ = [
    "POLICIES",
    "CacheStats",
    "Catalog",
    "Choice",
    "Claim",
    "ExpertCache",
    "Found",
    "LayerCount",
    "LayerTrace",
    "Limit",
    "Policy",
    "Replay",
    "Simulation",
    "Trace",
    "Visits",
    "ZipfTrace",
    "choose_policy",
    "gather",
    "load_trace",
    "make_policy",
    "one_by_one",
    "simulate",
    "uniform",
]
