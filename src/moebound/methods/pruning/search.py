"""Pruning by search (Lu et al., 2402.14800, section 3.2): `lu_re:keep6`.

The kept set S of each layer is the one that changes the layer's output least, on a calibration
text:

    minimise over S, |S| = r:   sum over batches of |F(x) - F_S(x)|_F

with F the layer's experts as they are, F_S the same with the logits of the others at -inf. Layer by
layer, each with the unpruned model's inputs (the paper's first variant; its "progressive" one takes
the pruned prefix's). `moebound calibrate --search` does the search, with the model's own router
(`calibrate/search.py`), and writes the best set of each size (statistic `kept`): all sets are tried
where a layer has 12 experts or fewer, else one expert after the other is left out, greedily.

What is stored: `pruned.py`. Reimplemented (`_re`). Deviations: the greedy elimination for layers
of more than 12 experts, which the paper does not look at; the text is the user's, where the
paper's is 128 x 2048 tokens of C4; where a router has groups, `keepN` must be a size that the
search has found a set of with enough experts in each.
"""

from __future__ import annotations

from typing import ClassVar

from moebound.errors import MethodError
from moebound.methods.base import GroupView
from moebound.methods.keeping import column, routing_of
from moebound.methods.pruning.pruned import Pruned
from moebound.types import Array


class Lu(Pruned):
    id: ClassVar[str] = "lu_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"kept"})

    def scores(self, group: GroupView) -> Array:
        n, table = self.count(len(group.experts)), column(group, "kept")
        if routing_of(group).n_experts != len(group.experts):
            raise MethodError("the search was over all experts of a layer: expected all of them")
        if table[n - 1].sum() != n:
            raise MethodError(
                f"keep{n}: the search found no set of so many experts of layer {group.layer}"
            )
        found: Array = table[n - 1]
        return found
