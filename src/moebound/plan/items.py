"""What a plan decides on: N items, each with a size at every rate of a grid, and maybe a loss.

An item is an expert, or one projection of it. Rates are the paper's α (MoE-Compression, 2509.07727,
section 3.1): no weight moves by more than α times the mean |weight| of its expert.

Sizes come from encoding (`store/sizes.py`); losses from a sensitivity map or a study. Each item's
loss is that of changing it alone, and a plan adds them up: to second order that is exact when the
errors of different experts do not correlate, which rounding errors hardly do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moebound.types import ExpertKey

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RATES: Floats = 0.01 * 2.0 ** (np.arange(25) / 3)
"""0.01 to 2.56, three to the octave: a third of a bit apart, about 8 bits to a third of one."""

LOSS_FLOOR = 0.01
"""Least loss of an item, in mean losses of its layer: an expert that calibration hardly reached is
not free, another text may reach it."""


@dataclass(frozen=True, eq=False)
class ExpertSizes:
    """What encoding one expert comes to. By role of its matrices, as the checkpoint has them.

    sizes: bytes at each of `rates`, envelopes whole. n_bytes: of the source. mean_abs: of all its
    weights. effective_rank: see `schemes.effective_rank`; None where nobody asked. errors: at each
    of `rates`, the squared error that the matrix leaves in the residual stream, a token of the
    calibration text (`methods.outputs`); empty without such a text. plain: the same of codec
    `bound`, at the rates of a sensitivity map; empty without one.
    """

    key: ExpertKey
    n_weights: Mapping[str, int]
    sizes: Mapping[str, Ints]
    n_bytes: int
    mean_abs: float
    effective_rank: float | None = None
    rates: Floats = field(default_factory=lambda: RATES)
    errors: Mapping[str, Floats] = field(default_factory=dict)
    plain: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.sizes)


@dataclass(frozen=True, eq=False)
class Items:
    """N items and R rates.

    keys: [N]. roles: [N] the matrices that share the item's bound. n_weights: [N].
    rates: [R] ascending. sizes: [N, R] bytes. loss: [N, R] nats of KL, each item changed alone;
    None where nothing is known. within: [N] octaves by which an expert's rate should be wider than
    its layer's mean, if all experts of a layer are to lose as much; None where that is not known.
    hull: [N] octaves by which an item's rate is wider than the mean in the plan that predicted
    losses ask for; None where none are known.
    """

    keys: tuple[ExpertKey, ...]
    roles: tuple[tuple[str, ...], ...]
    n_weights: Ints
    rates: Floats
    sizes: Ints
    loss: Floats | None = None
    within: Floats | None = None
    hull: Floats | None = None

    @classmethod
    def of(cls, experts: Sequence[ExpertSizes], *, per_role: bool) -> Items:
        """One item an expert, or one a matrix; no losses yet."""
        keys: list[ExpertKey] = []
        roles: list[tuple[str, ...]] = []
        n_weights: list[int] = []
        sizes: list[Ints] = []
        for expert in experts:
            for group in [(role,) for role in expert.roles] if per_role else [expert.roles]:
                keys.append(expert.key)
                roles.append(group)
                n_weights.append(sum(expert.n_weights[role] for role in group))
                sizes.append(np.sum([expert.sizes[role] for role in group], axis=0))
        grid = experts[0].rates
        return cls(tuple(keys), tuple(roles), np.array(n_weights), grid, np.array(sizes))

    def with_within(self, lost: Mapping[ExpertKey, float], power: float) -> Items:
        """The same with `within`, of what each expert loses at one rate, a power of the rate. One
        that loses nothing counts for the least there is in its layer; none for more than 2 octaves.
        """
        layers = np.array([key.layer for key in lost])
        values = np.array(list(lost.values()))
        wider = np.zeros(len(values))
        for layer in np.unique(layers):
            of = layers == layer
            least = values[of][values[of] > 0].min(initial=np.inf)
            if np.isfinite(least):
                logs = np.log2(np.maximum(values[of], least)) / power
                wider[of] = np.clip(logs.mean() - logs, -2, 2)
        by_key = dict(zip(lost, wider.tolist(), strict=True))
        return replace(self, within=np.array([by_key[key] for key in self.keys]))

    def with_loss(self, loss: Floats, *, floor: float = LOSS_FLOOR) -> Items:
        """The same with losses [N, R]: never falling with the rate, none below the floor."""
        grown = np.maximum.accumulate(loss, axis=1)
        names = [(key.layer, roles) for key, roles in zip(self.keys, self.roles, strict=True)]
        codes = {name: code for code, name in enumerate(dict.fromkeys(names))}
        group = np.array([codes[name] for name in names])
        count = np.bincount(group)[:, None]
        mean = np.zeros((len(count), grown.shape[1]))
        np.add.at(mean, group, grown)
        return replace(self, loss=np.maximum(grown, floor * (mean / count)[group]))

    def sizes_at(self, rates: Floats) -> Ints:
        """[N] bytes at one rate for each item, between those of the grid, rounded up."""
        return np.ceil(_between(self.rates, self.sizes.astype(np.float64), rates)).astype(np.int64)

    def loss_at(self, rates: Floats) -> Floats | None:
        """[N] loss at one rate for each item: a power law between two rates of the grid."""
        if self.loss is None:
            return None
        tiny = np.finfo(np.float64).tiny
        logs = _between(self.rates, np.log(np.maximum(self.loss, tiny)), rates)
        return np.where(logs > np.log(2 * tiny), np.exp(logs), 0.0)


def _between(grid: Floats, values: Floats, at: Floats) -> Floats:
    """[N] each row of values [N, R] at its own rate: straight lines over log rate."""
    position = np.interp(np.log(at), np.log(grid), np.arange(len(grid), dtype=np.float64))
    nearest = np.rint(position)  # a rate of the grid is one, whatever its logarithm's last digit
    position = np.where(np.abs(position - nearest) < 1e-9, nearest, position)
    left = np.minimum(position.astype(np.int64), len(grid) - 2)
    share = position - left
    rows = np.arange(len(values))
    result: Floats = values[rows, left] * (1 - share) + values[rows, left + 1] * share
    return result
