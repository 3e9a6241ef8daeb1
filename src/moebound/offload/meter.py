"""What a run did and what it waited for: counted while it runs, summed up when asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moebound.types import ExpertKey

clock = time.perf_counter

Cause = Literal["room", "read", "decode"]
CAUSES: tuple[Cause, ...] = ("room", "read", "decode")
"""What a computation may wait for: until a loader has time and the cache room, until the bytes
have come, until they are weights."""


@dataclass(slots=True)
class Load:
    """One expert brought in. n_bytes: moved for it. Times by `clock`, in the order they pass: asked
    for, room found, bytes there, weights there."""

    key: ExpertKey
    n_bytes: int
    n_weights: int
    speculative: bool
    asked: float = 0.0
    begun: float = 0.0
    read: float = 0.0
    done: float = 0.0

    def share(self, n: int) -> Load:
        """Of n that one thread brought together, one's share of the time."""
        return replace(
            self,
            read=self.begun + (self.read - self.begun) / n,
            done=self.begun + (self.done - self.begun) / n,
        )


@dataclass
class Meter:
    """Sums since the last `reset`. Any thread may add to it.

    Seconds: read and decode are those of the loading threads, added up; experts is the time spent
    in experts functions, of which stall was waiting; step is all of a forward pass. pairs: of a
    token and an expert, seen by a skipping policy. on_device: accesses to experts that waited,
    compressed, on the device that computes.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    experts_s: float = 0.0
    compute_s: float = 0.0
    step_s: float = 0.0
    stall_s: dict[Cause, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    loads: int = 0
    loaded_bytes: int = 0
    accesses: int = 0
    hits: int = 0
    on_device: int = 0
    steps: int = 0
    tokens: int = 0
    prefetched: int = 0
    predicted: int = 0
    predicted_right: int = 0
    skipped: int = 0
    coarse: int = 0
    pairs: int = 0
    pairs_skipped: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _counts: bool = field(default=True, repr=False)

    def loaded(self, load: Load) -> None:
        with self._lock:
            self.loads += 1
            self.loaded_bytes += load.n_bytes
            self.read_s += load.read - load.begun
            self.decode_s += load.done - load.read
            self.prefetched += load.speculative

    def stalled(self, begin: float, end: float, load: Load | None) -> None:
        """A computation waited from begin to end, for this load."""
        with self._lock:
            if load is None:
                self.stall_s["room"] += end - begin
                return
            marks = (begin, load.begun, load.read, end)
            at = begin
            for cause, until in zip(CAUSES, marks[1:], strict=True):
                until = min(max(until, at), end)
                self.stall_s[cause] += until - at
                at = until

    def add(self, **amounts: float) -> None:
        """Add to sums, by name."""
        with self._lock:
            for name, amount in amounts.items() if self._counts else ():
                setattr(self, name, getattr(self, name) + amount)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Nothing is added meanwhile: what is computed will be computed once more. Loads are
        loads."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def to_json(self) -> dict[str, Any]:
        with self._lock:
            found = {k: v for k, v in vars(self).items() if not k.startswith("_")}
            return {**found, "stall_s": dict(self.stall_s)}

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            for name, value in vars(Meter()).items():
                if not name.startswith("_"):
                    setattr(self, name, value)
