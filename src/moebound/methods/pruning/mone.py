"""MoNE, mixture of novices (2507.00390, section 3): `mone_re:keep6`.

    score_e = |sqrt(var_e)|_2 · sum over the tokens sent to e of g_e(x)

var_e is the variance of the expert's output by channel, over the tokens sent to it and without g.
(The paper's second factor is the mean of g over all tokens of the text, which differs from this
sum by the same factor for all experts.) The lowest are replaced by a "novice", the constant mean
mu_e of their outputs; the router is unchanged, so a novice is chosen as before, and mu_e is
multiplied by g.

From the statistics `plain` (sum of f and of f²), `tokens` and `sent_gates`. Stored: the kept
experts as their coder writes them, and for each novice mu_e in the layer's router edit: 4 d bytes,
float32, where the paper counts 2 d. Statistics of `--all-tokens` have the mean over all tokens. An
expert without tokens has score 0 and mu_e = 0.

Reimplemented (`_re`). Deviations: exactly the number asked is kept, where the released code drops
one more on ties; the variance counts the first batch, which the released code leaves out; the same
number in each layer (the paper's other choice, over the whole model, takes a plan).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from moebound.methods.base import GroupView
from moebound.methods.keeping import Keeping, column, numbers, some
from moebound.methods.router_edit import RouterEdit


class Mone(Keeping):
    id: ClassVar[str] = "mone_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"plain", "tokens", "sent_gates"})

    def edit(self, group: GroupView) -> RouterEdit:
        here = numbers(group)
        n = np.maximum(column(group, "tokens"), 1)[:, None]
        plain = column(group, "plain")
        mean = plain[:, 0] / n
        variance = np.maximum(plain[:, 1] / n - mean * mean, 0)
        scores = np.sqrt(variance.sum(1)) * column(group, "sent_gates")
        order = np.argsort(-scores, kind="stable")[self.count(len(here)) :]
        novices = {here[place]: mean[place].astype(np.float32) for place in sorted(order.tolist())}
        return RouterEdit(group.layer, constants=novices)

    def kept(self, group: GroupView, edit: RouterEdit) -> GroupView:
        keys = [e.key for e in group.experts if e.key.expert not in edit.constants]
        return replace(group, experts=some(group, keys))
