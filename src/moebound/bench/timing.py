"""Time several things fairly: warm, interleaved, and with the spread told."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MIN_REPEATS = 3
MAX_REPEATS = 200
COPY_BYTES = 128 << 20

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call: 20th, 50th and 80th percentile over `repeats` calls."""

    p20_s: float
    p50_s: float
    p80_s: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        p20, p50, p80 = np.percentile(seconds, [20, 50, 80])
        return cls(float(p20), float(p50), float(p80), len(seconds))


def interleaved(jobs: Mapping[Key, Callable[[], object]], seconds: float) -> dict[Key, Timing]:
    """Time every job, one call each in turn, so that a slow moment of the machine hits all alike.

    Each job has an equal share of `seconds`, but runs MIN_REPEATS times at least; the first call
    of each is not counted.
    """
    share = seconds / max(1, len(jobs))
    spent: dict[Key, list[float]] = {key: [] for key in jobs}
    for job in jobs.values():
        job()
    running = list(jobs)
    while running:
        for key in running:
            start = time.perf_counter()
            jobs[key]()
            spent[key].append(time.perf_counter() - start)
        running = [
            key
            for key in running
            if len(spent[key]) < MIN_REPEATS
            or (sum(spent[key]) < share and len(spent[key]) < MAX_REPEATS)
        ]
    return {key: Timing.of(seconds) for key, seconds in spent.items()}


def memcpy_gb_per_s(n_bytes: int = COPY_BYTES) -> float:
    """GB written a second by one thread copying a buffer larger than most caches, median of 9.

    The ceiling for a decoder that writes that many bytes.
    """
    source = np.ones(n_bytes, np.uint8)
    target = np.zeros(n_bytes, np.uint8)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return n_bytes / float(np.median(seconds[1:])) / 1e9
