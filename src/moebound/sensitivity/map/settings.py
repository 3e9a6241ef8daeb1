"""How a map is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moebound.errors import MoeboundError

Measure = Literal["sample", "all", "none"]
RATES = (0.1, 0.3, 0.5, 0.8)


@dataclass(frozen=True)
class MapSettings:
    """rates: ascending, of an expert's mean |weight|. codec: whose error. measure, n_sampled: of
    how many experts KL is measured too. seed: of the sample and of the probes. n_probes: random
    directions of the Fisher term. n_ties: routing decisions of each sequence that are followed.
    batch_tokens: read at a time. memory_bytes: about how much may be kept of the passes; more
    layers than fit in it are done in several passes.
    """

    rates: tuple[float, ...] = RATES
    codec: str = "bound"
    measure: Measure = "sample"
    n_sampled: int = 100
    seed: int = 0
    n_probes: int = 16
    n_ties: int = 96
    batch_tokens: int = 2048
    memory_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        rates = self.rates
        if not rates or not all(math.isfinite(r) and r > 0 for r in rates):
            raise MoeboundError(f"rates {rates}: expected finite numbers above 0")
        if list(rates) != sorted(set(rates)):
            raise MoeboundError(f"rates {rates}: expected ascending, each once")
        if self.measure not in get_args(Measure):
            raise MoeboundError(f"measure {self.measure!r}: expected one of {get_args(Measure)}")
        least = {"n_sampled": 1, "seed": 0, "n_probes": 1, "n_ties": 0, "batch_tokens": 1,
                 "memory_bytes": 1}  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise MoeboundError(f"{name} {getattr(self, name)}: expected {lowest} or more")

    def to_json(self) -> dict[str, Any]:
        """What the result depends on: memory and batches change its last digits only."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if name not in ("batch_tokens", "memory_bytes")
        }
