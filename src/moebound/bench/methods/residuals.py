"""Does a base pay for itself? `residual:BASE` beside plain `bound`, at the same promise.

Both keep the same bound on every weight, so what tells them apart is bytes alone. A base of b bits
a weight that explains ρ of the weights' energy should save

    s = ½ log2(1 / (1 - ρ))

bits of what is left to code, and pay where s > b. Measured beside it: the bits of both, frames and
all, at several rates, on all experts of LAYERS layers spread over the model; every weight is
decoded and its promise checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moebound.checkpoint import Checkpoint, Expert
from moebound.errors import MoeboundError
from moebound.files.documents import fields_of
from moebound.files.formats.statistics import Statistics
from moebound.methods import compress, get_method
from moebound.store.at_size import groups_of, measured
from moebound.store.recipe import Recipe
from moebound.types import ErrorBound

RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
LAYERS = 2
_PLAIN = "bounded:bound"


@dataclass(frozen=True)
class BaseRow:
    """One base. base_bits: a weight, what it takes. explained: ρ. rates: of the bound, in mean
    |weight| of an expert. plain, residual: bits a weight at each. reason: why there are none."""

    base: str
    base_bits: float = math.nan
    explained: float = math.nan
    rates: tuple[float, ...] = ()
    plain: tuple[float, ...] = ()
    residual: tuple[float, ...] = ()
    reason: str | None = None

    @property
    def predicted_saving(self) -> float:
        """s, in bits a weight."""
        return 0.5 * math.log2(1 / max(1 - self.explained, 1e-300)) if self.explained < 1 else 0.0

    @property
    def predicted_to_pay(self) -> bool:
        return self.predicted_saving > self.base_bits

    @property
    def saved(self) -> tuple[float, ...]:
        """Bits a weight of what is left to code that are saved, at each rate; without the base."""
        pairs = zip(self.plain, self.residual, strict=True)
        return tuple(plain - (residual - self.base_bits) for plain, residual in pairs)

    @property
    def beats_at(self) -> tuple[float, ...]:
        """The rates at which it takes fewer bits than plain `bound`; empty for never."""
        pairs = zip(self.rates, self.plain, self.residual, strict=True)
        return tuple(rate for rate, plain, residual in pairs if residual < plain)

    def to_json(self) -> dict[str, Any]:
        if self.reason is not None:
            return {"base": self.base, "reason": self.reason}
        return {
            **asdict(self),
            "predicted_saving": self.predicted_saving,
            "predicted_to_pay": self.predicted_to_pay,
            "saved": self.saved,
            "beats_at": self.beats_at,
        }

    @classmethod
    def of_kept(cls, data: Mapping[str, Any]) -> BaseRow:
        """Raises FormatError."""
        with fields_of("rows that are kept"):
            rates, plain, residual = (
                tuple(map(float, data[name])) for name in ("rates", "plain", "residual")
            )
            bits, explained = float(data["base_bits"]), float(data["explained"])
            return cls(str(data["base"]), bits, explained, rates, plain, residual)


def base_row(
    checkpoint: Checkpoint,
    base: str,
    calibration: Statistics | None,
    rates: Sequence[float] = RATES,
) -> BaseRow:
    """Measure one base. What it cannot take is its reason."""
    try:
        return _measured(checkpoint, base, calibration, rates)
    except MoeboundError as error:
        return BaseRow(base, reason=str(error))


def _measured(
    checkpoint: Checkpoint, base: str, calibration: Statistics | None, rates: Sequence[float]
) -> BaseRow:
    inner = get_method(base)
    layers = _layers(checkpoint)
    recipe = Recipe.of(None, base, calibration)
    n_bytes, n_weights, left, energy = 0, 0, 0.0, 0.0
    for layer in layers:
        groups = [[expert] for expert in layer] if inner.scope == "expert" else [layer]
        for group in groups:
            view = recipe.seen(checkpoint, group, inner)
            made = compress(inner, view)
            size = sum(expert.size for expert in group)
            n_bytes, n_weights = n_bytes + made.n_bytes, n_weights + size
            left += made.rmse**2 * size
            energy += sum(
                float((matrix.astype(np.float64) ** 2).sum())
                for expert in view.experts
                for matrix in expert.matrices.values()
            )

    def bits(setting: str, rate: float) -> float:
        method = get_method(setting)
        own = Recipe.of(ErrorBound(rate, "rate", "expert"), setting, calibration)
        some = layers if method.scope == "layer" else [[e] for layer in layers for e in layer]
        return measured(checkpoint, method, own, some)[0]

    explained = max(0.0, 1 - left / max(energy, 1e-300))
    return BaseRow(
        inner.setting, 8 * n_bytes / n_weights, explained, tuple(rates),
        tuple(bits(_PLAIN, rate) for rate in rates),
        tuple(bits(f"residual:{base}", rate) for rate in rates),
    )  # fmt: skip


def _layers(checkpoint: Checkpoint) -> list[list[Expert]]:
    every = groups_of(checkpoint, get_method("svd:r0"))
    places = np.unique(np.linspace(0, len(every) - 1, LAYERS + 2).round().astype(int))[1:-1]
    return [every[at] for at in places] or every[:1]
