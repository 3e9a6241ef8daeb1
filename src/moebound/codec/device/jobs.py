"""What one launch is to do: arrays, where their bytes are now, and where their weights go.

A few numbers an array, made anew for every launch; all else the kernels find in the metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moebound.codec.device import metadata as md
from moebound.codec.device.metadata import Metadata
from moebound.codec.device.stream import Numbers

FIELDS = 4
"""Of a job: array, address of its first value, first byte of its envelope, first slot."""


@dataclass(frozen=True)
class Group:
    """Jobs whose values have the same number of bytes: one launch of a kernel each.

    item: bytes of a value. first, n: which jobs. low_bits: at least those of any. classes, exact:
    whether any array has classes, or is an exact copy. scaled, halves, factors: whether any has
    steps, or is of float16 and has them, or has factors, too. patches: the most of any.
    """

    item: int
    first: int
    n: int
    low_bits: int
    classes: bool
    exact: bool
    scaled: bool
    halves: bool
    factors: bool
    patches: int


@dataclass(frozen=True)
class Jobs:
    """numbers: [n, FIELDS] int64. arrays: [n], of each job, its number in the metadata. segments,
    tables: the most of any; so many places has each job among programs and status words. n_slots:
    of all tables. aligned: whether all segments begin at even bytes.
    """

    numbers: Numbers
    arrays: Numbers
    groups: tuple[Group, ...]
    segments: int
    tables: int
    n_slots: int
    aligned: bool

    def __len__(self) -> int:
        return len(self.arrays)


def make_jobs(
    known: Metadata,
    arrays: Sequence[int],
    offsets: Sequence[int],
    addresses: Sequence[int],
    first_slots: Numbers | None = None,
) -> Jobs:
    """offsets: where each envelope begins in the compressed bytes. first_slots: of the tables of
    each; None for one behind the other. Arrays that the host has decoded are left out."""
    which = np.asarray(arrays, np.int64)
    facts = known.facts[which]
    numbers = np.empty((len(which), FIELDS), np.int64)
    numbers[:, 0], numbers[:, 1], numbers[:, 2] = which, addresses, offsets
    numbers[:, 3] = 0 if first_slots is None else first_slots
    items = facts[:, md.ITEM]
    if (len(which) and not (items == items[0]).all()) or not items.all():
        order = np.argsort(items, kind="stable")
        order = order[np.searchsorted(items[order], 1) :]
        which, facts, numbers = which[order], facts[order], numbers[order]
        items = facts[:, md.ITEM]
    ends = np.cumsum(facts[:, md.SLOTS])
    if first_slots is None:
        numbers[:, 3] = ends - facts[:, md.SLOTS]
    groups = []
    first = 0
    for item in (2, 4):
        n = int((items == item).sum())
        if n:
            groups.append(_group(item, first, facts[first : first + n]))
        first += n
    most = facts.max(axis=0, initial=0)
    return Jobs(
        numbers,
        which,
        tuple(groups),
        int(most[md.SEGMENTS]),
        int(most[md.TABLES]),
        int(ends[-1]) if len(ends) else 0,
        not ((numbers[:, 2] + facts[:, md.ODD]) % 2).any(),
    )


def _group(item: int, first: int, facts: Numbers) -> Group:
    most = facts.max(axis=0)
    return Group(
        item,
        first,
        len(facts),
        _rounded_up(int(most[md.LOW_BITS])),
        bool(most[md.TABLES] > 1),
        bool(most[md.EXACT]),
        bool(most[md.SCALED]),
        bool((facts[:, md.SCALED] & md.TO_HALF).any()),
        bool((facts[:, md.SCALED] & md.BOTH_SIDES).any()),
        int(most[md.PATCHES]),
    )


def _rounded_up(low_bits: int) -> int:
    """To one of few numbers: a kernel is compiled for each."""
    return next(n for n in (0, 1, 2, 4, 8) if n >= low_bits)
