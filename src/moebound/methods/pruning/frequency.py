"""Pruning by frequency: `frequency:keep6`, the control that every other score is compared with.

Score of an expert: the tokens of the calibration text that the router sent to it (statistic
`sent`). No paper's: all papers on pruning experts report it as a baseline (REAP, 2510.13999,
table 1; MoNE, 2507.00390, table 1).
"""

from __future__ import annotations

from typing import ClassVar

from moebound.methods.base import GroupView
from moebound.methods.keeping import column
from moebound.methods.pruning.pruned import Pruned
from moebound.types import Array


class Frequency(Pruned):
    id: ClassVar[str] = "frequency"
    statistics: ClassVar[frozenset[str]] = frozenset({"sent"})

    def scores(self, group: GroupView) -> Array:
        return column(group, "sent")
