"""Decoding tables of many arrays, expanded once, that stay on the device.

A launch reads tables in one of two forms, and which depends on its company (`Schedule.wide`). So
both are kept: a byte a slot of all arrays; and four bytes a slot of those that a launch might read
so, whose own tables have MOST_WIDE bytes at most. A matrix of one table of 2^12 slots takes 20 kB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moebound.codec.device import metadata as md
from moebound.codec.device.jobs import make_jobs
from moebound.codec.device.launch import (
    MOST_WIDE,
    OnDevice,
    Schedule,
    Tables,
    expand,
    slot_bytes,
)
from moebound.codec.device.stream import Numbers

if TYPE_CHECKING:
    import torch

AT_ONCE = 1 << 14
"""Arrays that one launch expands; CUDA has 2^16 places there."""


class KeptTables:
    """Of all arrays of `known`. The device is the current one; waits for it."""

    def __init__(self, known: OnDevice) -> None:
        self._slots = known.metadata.facts[:, md.SLOTS]
        self._forms = {wide: self._expanded(known, wide) for wide in (False, True)}
        if known.block.device.type == "cuda":
            import torch

            torch.cuda.current_stream().synchronize()

    @property
    def n_bytes(self) -> int:
        return sum(tables.slots.nbytes for tables, _ in self._forms.values())

    def of(self, arrays: Sequence[int], schedule: Schedule) -> tuple[Tables, Numbers] | None:
        """Their tables, and the first slot of each; None if not all are kept in the form that this
        launch takes."""
        which = np.asarray(arrays, np.int64)
        tables, first = self._forms[schedule.is_wide(int(self._slots[which].sum()))]
        found = first[which]
        return (tables, found) if (found >= 0).all() else None

    def _expanded(self, known: OnDevice, wide: bool) -> tuple[Tables, Numbers]:
        kept = _kept(self._slots, wide)
        first = np.full(len(self._slots), -1, np.int64)
        first[kept] = np.cumsum(self._slots[kept]) - self._slots[kept]
        tables = Tables.empty(int(self._slots[kept].sum()), wide, known.block.device)
        for at in range(0, len(kept), AT_ONCE):
            some = kept[at : at + AT_ONCE]
            nowhere = [0] * len(some)  # no weights are read or written
            jobs = make_jobs(known.metadata, some.tolist(), nowhere, nowhere, first[some])
            expand(known, jobs, _copied(jobs.numbers, known.block), tables)
        return tables, first


def kept_bytes(slots: Numbers) -> int:
    """What the tables of arrays with so many slots take."""
    return sum(slot_bytes(w) * int(slots[_kept(slots, w)].sum()) for w in (False, True))


def _kept(slots: Numbers, wide: bool) -> Numbers:
    found: Numbers = np.flatnonzero(slots * slot_bytes(wide) <= MOST_WIDE if wide else slots > 0)
    return found


def _copied(numbers: Numbers, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(numbers).to(like.device)
