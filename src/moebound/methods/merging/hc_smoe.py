"""HC-SMoE, hierarchical clustering of experts (2410.08589, section 3): `hc_smoe_fixed:keep4`.

Each expert is described by its mean output. The two clusters whose members' descriptions are
nearest on average (Euclidean) are joined, until as many are left as are to be kept; a cluster's
weights are the mean weighted by tokens. From the statistics `plain`, `tokens` and `sent`. What is
stored: `merged.py`.

The paper's mean is over all tokens of the text, whoever they were sent to: that is what `moebound
calibrate --all-tokens` gathers. Without it, the mean is over the tokens sent to each expert.

Repaired (`_fixed`): both released scripts ask for "hirarchical" clustering where the code knows
"hierarchical", and so run k-means. `hc_smoe_fixed:keep4:kmeans` does that (with a first choice of
centers that is the same on every machine, in the place of k-means++). The released counts are of
the two first choices, whatever the model's top-k; here they are of all that the router chose.
"""

from __future__ import annotations

from typing import ClassVar

from moebound.methods.base import GroupView
from moebound.methods.merging.merged import Merged, average_linkage, k_means, mean_outputs


class HcSmoe(Merged):
    id: ClassVar[str] = "hc_smoe_fixed"
    known: ClassVar[str] = "kmeans"
    statistics: ClassVar[frozenset[str]] = frozenset({"sent", "tokens", "plain"})

    def clusters(self, group: GroupView, n: int) -> list[list[int]]:
        find = average_linkage if self.flag("kmeans") is None else k_means
        return find(mean_outputs(group), n)
