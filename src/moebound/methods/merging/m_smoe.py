"""M-SMoE, "Merge, then compress" (2310.01334, section 3): `m_smoe_re:keep4`.

The experts that got the most tokens are dominant. Each other expert joins the dominant one whose
router logits are most like its own, by their cosine over all tokens of the text:

    cos(i, j) = sum_t l_i l_j / sqrt(sum_t l_i² · sum_t l_j²)

A cluster's weights are the mean weighted by tokens. From the statistics `sent` and `logits` (the
sums above). What is stored: `merged.py`.

Reimplemented (`_re`). Deviations: neurons are not brought into the dominant expert's order before
the mean (the paper permutes them; it is an option there); the same number of dominant experts in
each layer, where the paper takes the most frequent of the whole model (a plan may give each layer
a number); no training or distillation afterwards.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moebound.methods.base import GroupView
from moebound.methods.keeping import column, numbers
from moebound.methods.merging.merged import Merged


class MSmoe(Merged):
    id: ClassVar[str] = "m_smoe_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"sent", "logits"})

    def clusters(self, group: GroupView, n: int) -> list[list[int]]:
        here = numbers(group)
        dominant = np.argsort(-column(group, "sent"), kind="stable")[:n].tolist()
        gram = column(group, "logits")[:, here]
        norms = np.sqrt(np.maximum(np.diagonal(gram), 0))
        cosine = gram / np.maximum(np.outer(norms, norms), np.finfo(np.float64).tiny)
        found: dict[int, list[int]] = {place: [place] for place in dominant}
        for place in range(len(here)):
            if place not in found:
                nearest = dominant[int(np.argmax(cosine[place, dominant]))]
                found[nearest].append(place)
        return list(found.values())
