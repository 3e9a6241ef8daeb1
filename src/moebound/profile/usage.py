"""How one layer's experts were used: counts, and the weights that their outputs were given.

Weights are those that the experts' outputs are multiplied by: after normalisation and after the
family's scaling factor (Moonlight's six add up to 2.446, not to 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moebound.cache import LayerTrace
from moebound.errors import MoeboundError
from moebound.types import Array

WEIGHT_EDGES: Array = 2.0 ** (np.arange(-40, 9) / 4)
"""Edges of the histogram of weights: four bins an octave from 2^-10 to 4. Bin 0 has what is below,
the last what is at or above. The same for every model, so that histograms can be added."""

N_BINS = len(WEIGHT_EDGES) + 1


@dataclass(frozen=True, eq=False)
class LayerUse:
    """Sums over all tokens of a task, for the E experts of one decoder layer.

    n_tokens: tokens routed. counts: [E] int64, times chosen (Σ = K · n_tokens, or less where a
    router may choose nobody). weight_sums, weight_squares: [E] float64, Σ w and Σ w² over those
    times. histogram: [E, N_BINS] int64, times chosen with a weight in each bin of WEIGHT_EDGES.
    """

    layer: int
    n_tokens: int
    counts: Array
    weight_sums: Array
    weight_squares: Array
    histogram: Array

    @classmethod
    def of(cls, trace: LayerTrace) -> LayerUse:
        """Count one layer of a trace."""
        n_experts = trace.n_experts
        chosen = trace.index >= 0
        index = trace.index[chosen].astype(np.int64)
        weights = trace.weights[chosen].astype(np.float64)
        bins = np.searchsorted(WEIGHT_EDGES, weights, side="right")
        return cls(
            trace.layer,
            len(trace.index),
            np.bincount(index, minlength=n_experts),
            np.bincount(index, weights, minlength=n_experts),
            np.bincount(index, weights**2, minlength=n_experts),
            np.bincount(index * N_BINS + bins, minlength=n_experts * N_BINS).reshape(-1, N_BINS),
        )

    @property
    def n_experts(self) -> int:
        return len(self.counts)

    @property
    def top_k(self) -> float:
        """Experts chosen a token, on average: K, or less where a router may choose nobody."""
        return float(self.counts.sum() / self.n_tokens) if self.n_tokens else 0.0

    @property
    def frequencies(self) -> Array:
        """[E]: the share of tokens that chose each expert. Evenly used, all are K / E."""
        frequencies: Array = self.counts / max(self.n_tokens, 1)
        return frequencies

    @property
    def mean_weights(self) -> Array:
        """[E]: mean weight when chosen; 0 for an expert that never was."""
        means: Array = self.weight_sums / np.maximum(self.counts, 1)
        return means

    @property
    def weight_deviations(self) -> Array:
        """[E]: standard deviation of the weight when chosen."""
        variance = self.weight_squares / np.maximum(self.counts, 1) - self.mean_weights**2
        deviations: Array = np.sqrt(np.maximum(variance, 0.0))
        return deviations

    @cached_property
    def ranking(self) -> tuple[int, ...]:
        """Experts from the most to the least often chosen; of equals the lower index first."""
        return tuple(int(expert) for expert in np.argsort(-self.counts, kind="stable"))

    def weight_quantile(self, share: float, expert: int | None = None) -> float:
        """The weight that a share of all choices (of one expert) stays below, from the histogram.

        Within a bin (a quarter of an octave) values count as spread evenly in the logarithm, so it
        is right to about a tenth. NaN if nothing was chosen. share: in [0, 1].
        """
        bins = self.histogram.sum(0) if expert is None else self.histogram[expert]
        total = int(bins.sum())
        if not total:
            return math.nan
        up_to = np.cumsum(bins)
        # At least one choice, so that the bin that is found has some.
        wanted = min(max(share * total, 1.0), total)
        at = int(np.searchsorted(up_to, wanted, side="left"))
        if at == 0:
            return float(WEIGHT_EDGES[0])
        if at == N_BINS - 1:
            return float(WEIGHT_EDGES[-1])
        inside = float(wanted - up_to[at - 1]) / float(bins[at])
        low, high = math.log2(WEIGHT_EDGES[at - 1]), math.log2(WEIGHT_EDGES[at])
        return float(2 ** (low + (high - low) * inside))

    def __add__(self, other: LayerUse) -> LayerUse:
        if (self.layer, self.n_experts) != (other.layer, other.n_experts):
            raise MoeboundError(
                f"layer {self.layer} with {self.n_experts} experts and layer {other.layer} with "
                f"{other.n_experts} are not of one model"
            )
        return LayerUse(
            self.layer,
            self.n_tokens + other.n_tokens,
            self.counts + other.counts,
            self.weight_sums + other.weight_sums,
            self.weight_squares + other.weight_squares,
            self.histogram + other.histogram,
        )

    def to_json(self, *, histogram: bool = True) -> dict[str, Any]:
        """As plain lists; mean_weights is for readers, and follows from the rest."""
        document = {
            "layer": self.layer,
            "n_tokens": self.n_tokens,
            "n_experts": self.n_experts,
            "counts": self.counts.tolist(),
            "weight_sums": self.weight_sums.tolist(),
            "weight_squares": self.weight_squares.tolist(),
            "mean_weights": self.mean_weights.tolist(),
        }
        return {**document, "histogram": self.histogram.tolist()} if histogram else document

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerUse:
        """Raises KeyError for a field that is missing, ValueError for one of a wrong shape."""
        n_experts = len(data["counts"])
        counts = _read(data, "counts", np.int64, n_experts)
        histogram = _read(data, "histogram", np.int64, n_experts, N_BINS)
        if not np.array_equal(histogram.sum(1), counts):
            raise ValueError(f"layer {data['layer']}: the histogram does not add up to the counts")
        return cls(
            int(data["layer"]),
            int(data["n_tokens"]),
            counts,
            _read(data, "weight_sums", np.float64, n_experts),
            _read(data, "weight_squares", np.float64, n_experts),
            histogram,
        )


def _read(data: Mapping[str, Any], name: str, dtype: Any, *shape: int) -> Array:
    values = np.asarray(data[name])
    counts = dtype is np.int64
    if values.shape != shape or values.dtype.kind not in ("iu" if counts else "iuf"):
        raise ValueError(
            f"layer {data['layer']}: {name}: expected numbers {list(shape)}, found "
            f"{values.dtype} {list(values.shape)}"
        )
    if not np.isfinite(values).all() or (counts and (values < 0).any()):
        raise ValueError(f"layer {data['layer']}: {name}: negative or not finite")
    return values.astype(dtype)
