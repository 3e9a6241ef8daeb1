"""Replacement policies, one a file; `base.Policy` is what they have in common."""

from __future__ import annotations

from moebound.cache.policies.activation_aware import ActivationAware
from moebound.cache.policies.base import Policy
from moebound.cache.policies.greedy_dual import GreedyDual
from moebound.cache.policies.hobbit import Hobbit
from moebound.cache.policies.lfru import LFRU
from moebound.cache.policies.lfu import LFU
from moebound.cache.policies.lru import LRU
from moebound.errors import CacheError

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (LRU, LFU, LFRU, ActivationAware, Hobbit, GreedyDual)
}
"""By name, the plainest first: of equally good ones, the first is chosen."""


def make_policy(name: str) -> Policy:
    """A new one, with its default settings. Raises CacheError for a name that is not known."""
    if name not in POLICIES:
        raise CacheError(f"policy {name!r}: expected one of {', '.join(POLICIES)}")
    return POLICIES[name]()
