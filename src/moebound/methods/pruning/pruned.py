"""Pruning by a score: each layer keeps its best experts, and its router chooses among these.

Stored: the kept experts as their coder writes them; for each layer a router edit with the kept
numbers; of the others nothing. In bytes, with `bounded:raw` and experts of w weights in 2 bytes:
2 w for each kept expert. The router's own rows stay in the checkpoint (2 d bytes for each expert
that is left out), so that an expert keeps its number.

The router's weights of the kept experts are as if only they had been there: the others' logits are
-inf before it chooses (docs/format-method.md, section 2).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

from moebound.methods.base import GroupView
from moebound.methods.keeping import Keeping, best, numbers, routing_of, some
from moebound.methods.router_edit import RouterEdit
from moebound.types import Array


class Pruned(Keeping):
    """Keeps the experts with the largest scores; of equal ones the first."""

    def edit(self, group: GroupView) -> RouterEdit:
        here, routing = numbers(group), routing_of(group)
        n = self.count(len(here))
        if n == len(here):
            return RouterEdit(group.layer)
        places = best(self.scores(group), n, routing, percent=self.keep.endswith("%"))
        # Experts that the method was not shown may be chosen as before.
        others = set(range(routing.n_experts)) - set(here)
        return RouterEdit(group.layer, keep=tuple(sorted({here[p] for p in places} | others)))

    def kept(self, group: GroupView, edit: RouterEdit) -> GroupView:
        keys = [e.key for e in group.experts if edit.keep is None or e.key.expert in edit.keep]
        return replace(group, experts=some(group, keys))

    @abstractmethod
    def scores(self, group: GroupView) -> Array:
        """[E] float64, the larger the more an expert is needed."""
