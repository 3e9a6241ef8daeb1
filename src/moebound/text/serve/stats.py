"""What has been served, and how fast.

ttft: time to first token, from the moment a request was accepted, so waiting counts; what a client
sees, the network apart. tpot: time per output token behind the first.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

RECENT = 1000
"""Requests whose times are kept."""

_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, math.inf)
HISTOGRAMS = {
    "queued_s": _REQUEST_S,
    "ttft_s": _REQUEST_S,
    "tpot_s": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, math.inf),
    "total_s": _REQUEST_S,
}
"""Times of a record -> upper bounds of the buckets that they are counted in."""

Outcome = Literal["completed", "cancelled", "failed"]


@dataclass(frozen=True)
class Record:
    """One request that has left. Times in seconds; None for what it did not reach."""

    outcome: Outcome
    reason: str
    n_prompt: int
    n_new: int
    queued_s: float
    ttft_s: float | None
    tpot_s: float | None
    total_s: float

    def line(self) -> str:
        """For a log. Says nothing of what was asked and answered."""
        parts = [f"{self.n_prompt} + {self.n_new} tokens", f"waited {self.queued_s:.2f} s"]
        if self.ttft_s is not None:
            parts.append(f"first token after {self.ttft_s:.2f} s")
        if self.tpot_s is not None:
            parts.append(f"then {1000 * self.tpot_s:.1f} ms a token")
        return f"{self.outcome} ({self.reason}): " + ", ".join(parts)


@dataclass
class Histogram:
    """counts: of each bucket alone. total: of all values."""

    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    @property
    def cumulative(self) -> list[int]:
        """Values up to each bound."""
        return list(accumulate(self.counts))


class ServeStats:
    """Counters since the start, and quantiles of the last RECENT requests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._counts = Counter[str]()
        self._recent = deque[Record](maxlen=RECENT)
        self._histograms = {
            name: Histogram([0] * len(bounds)) for name, bounds in HISTOGRAMS.items()
        }

    def add(self, record: Record) -> None:
        with self._lock:
            self._counts[record.outcome] += 1
            self._counts["prompt_tokens"] += record.n_prompt if record.n_new else 0
            self._counts["new_tokens"] += record.n_new
            self._recent.append(record)
            for name, histogram in self._histograms.items():
                value = getattr(record, name)
                if value is not None:
                    histogram.counts[bisect_left(HISTOGRAMS[name], value)] += 1
                    histogram.total += value

    def refuse(self) -> None:
        """One request that found the queue full."""
        with self._lock:
            self._counts["refused"] += 1

    def mean_s(self) -> float:
        """What a request that was completed takes without waiting; 0 before the first."""
        with self._lock:
            times = [r.total_s - r.queued_s for r in self._recent if r.outcome == "completed"]
        return sum(times) / len(times) if times else 0.0

    def histograms(self) -> dict[str, Histogram]:
        """Of all requests since the start."""
        with self._lock:
            return {
                name: Histogram(list(found.counts), found.total)
                for name, found in self._histograms.items()
            }

    def to_json(self) -> dict[str, Any]:
        with self._lock:
            counts, recent = Counter(self._counts), list(self._recent)
        return {
            "uptime_s": time.monotonic() - self._begun,
            "requests": {
                name: counts[name] for name in ("completed", "cancelled", "failed", "refused")
            },
            "prompt_tokens": counts["prompt_tokens"],
            "new_tokens": counts["new_tokens"],
            "queued_s": _quantiles(record.queued_s for record in recent),
            "ttft_s": _quantiles(record.ttft_s for record in recent),
            "tpot_s": _quantiles(record.tpot_s for record in recent),
        }


def _quantiles(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """n, p50, p95 and max; nearest ranks."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return {"n": 0, "p50": None, "p95": None, "max": None}
    middle, high = (found[math.ceil(share * len(found)) - 1] for share in (0.5, 0.95))
    return {"n": len(found), "p50": middle, "p95": high, "max": found[-1]}
