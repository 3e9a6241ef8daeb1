"""Put an error into some experts of a loaded model, in place, and take it out again exactly.

    bound = ErrorBound(0.8, "rate", "expert")
    with perturbed(experts.pick(keys), "gaussian-sd", bound, seed=1) as realised:
        ...  # the model now has the error; realised says how large it came out

Undone by copying the saved bits back, never by subtracting, also after an exception or Ctrl-C. No
second copy of the model: only the weights of the experts touched are kept. `perturbation` computes
the new weights once, to be applied as often as wanted: what pays for slow codecs.

What is realised is measured in float64 on the weights as the model then has them. In a bfloat16
model the cast swallows small errors (at a rate of 0.001, four of five weights do not change) and
adds to others; load in float32 where that is not what is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moebound.codec import measure
from moebound.codec.arrays import to_numpy
from moebound.model.live import LiveExpert
from moebound.model.undo import Matrices, exactly_undone
from moebound.sensitivity.noise import ErrorSource, generators_for, matrix_stats, parse_source
from moebound.types import DType, ErrorBound, ExpertKey, TensorStats

Experts = Mapping[ExpertKey, LiveExpert] | Iterable[LiveExpert]


@dataclass(frozen=True)
class Realised:
    """The error that a perturbation really put into a model.

    source, bound, seed: as asked. n_experts, n_weights: how many were perturbed.
    max_abs_error, rmse: in weight units, over all of them, after the cast to the model's dtype.
    relative_rmse: rmse over the root mean square of the weights. beyond: share of the weights that
    moved by more than their bound, None where the source knows no bound. unchanged: share of the
    weights that did not move. n_bytes: encoded bytes, envelopes included; None for a simulated
    error.
    """

    source: str
    bound: ErrorBound | None
    seed: int
    n_experts: int
    n_weights: int
    max_abs_error: float
    rmse: float
    relative_rmse: float
    beyond: float | None
    unchanged: float
    n_bytes: int | None

    @property
    def bits_per_weight(self) -> float | None:
        if self.n_bytes is None or not self.n_weights:
            return None
        return 8 * self.n_bytes / self.n_weights

    def to_json(self) -> dict[str, Any]:
        bound = None if self.bound is None else self.bound.to_json()
        return {**vars(self), "bound": bound, "bits_per_weight": self.bits_per_weight}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Realised:
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        bound = fields["bound"]
        return cls(**{**fields, "bound": None if bound is None else ErrorBound.from_json(bound)})


@dataclass(frozen=True, eq=False)
class Perturbation:
    """New weights of some experts, ready to be put in place of the old ones, again and again.

    weights: by expert and role, in the model's dtype and on its device.
    """

    experts: tuple[LiveExpert, ...]
    weights: Mapping[ExpertKey, Matrices]
    realised: Realised

    @contextmanager
    def applied(self) -> Iterator[Realised]:
        """The model has the new weights inside of the `with`, and its own again after it.

        May be nested with others that touch other experts. Raises MoeboundError if one of these
        experts is perturbed already.
        """
        with exactly_undone(self.experts) as undo:
            for expert in self.experts:
                undo.replace(expert, self.weights[expert.key])
            yield self.realised


def perturbation(
    experts: Experts,
    source: str | ErrorSource,
    bound: ErrorBound | None,
    *,
    seed: int = 0,
    dtype: DType | None = None,
) -> Perturbation:
    """Compute an error once; nothing in the model changes until it is `applied`.

    Arguments and errors as `perturbed`. Keeps a copy of the weights of these experts.
    """
    chosen, source = _listed(experts), parse_source(source)
    with exactly_undone(chosen):  # refuses experts that are perturbed right now
        tally = _Tally(source, bound, seed)
        weights = {e.key: _compute(e, source, bound, seed, dtype, tally) for e in chosen}
    return Perturbation(chosen, weights, tally.realised())


@contextmanager
def perturbed(
    experts: Experts,
    source: str | ErrorSource,
    bound: ErrorBound | None,
    *,
    seed: int = 0,
    dtype: DType | None = None,
) -> Iterator[Realised]:
    """Inside of the `with` these experts have an error of this source and size.

    experts: LiveExperts, a part of them, or any of their values. source: an id or a source, see
    `noise.py`. bound: its size; None for a source that has none (randomise, exact codecs). seed:
    of the draws. dtype: of the weights in their checkpoint, for codecs; found out if None (see
    `dtypes.stored_dtype`).

    Guarantee: on leaving, every weight has the bits that it had on entering, whatever happened.
    Nested use is for other experts; MoeboundError for one that is perturbed already. Raises
    BoundError, CodecError and BackendUnavailable as the source does.
    """
    chosen, source = _listed(experts), parse_source(source)
    with exactly_undone(chosen) as undo:
        tally = _Tally(source, bound, seed)
        for expert in chosen:
            undo.replace(expert, _compute(expert, source, bound, seed, dtype, tally))
        yield tally.realised()


def _listed(experts: Experts) -> tuple[LiveExpert, ...]:
    values = experts.values() if isinstance(experts, Mapping) else experts
    return tuple({expert.key: expert for expert in values}.values())


def _compute(
    expert: LiveExpert,
    source: ErrorSource,
    bound: ErrorBound | None,
    seed: int,
    dtype: DType | None,
    tally: _Tally,
) -> Matrices:
    """New weights in the model's dtype, on its device."""
    old = expert.matrices
    by_role = {role: matrix_stats(matrix) for role, matrix in old.items()}
    whole = sum(by_role.values(), TensorStats())
    changed = source.apply(old, bound, whole, generators_for(seed, expert.key), dtype=dtype)
    new = {role: changed.matrices[role].to(matrix.dtype) for role, matrix in old.items()}
    for role, matrix in old.items():
        epsilon = None if changed.epsilons is None else changed.epsilons[role]
        tally.add(matrix, new[role], epsilon)
    tally.add_expert(whole, changed.n_bytes)
    return {role: new[role].to(matrix.device) for role, matrix in old.items()}


@dataclass
class _Tally:
    """Adds up what is realised, matrix by matrix."""

    source: ErrorSource
    bound: ErrorBound | None
    seed: int
    n_experts: int = 0
    n_weights: int = 0
    worst: float = 0.0
    square_error: float = 0.0
    squares: float = 0.0
    beyond: int | None = None
    unchanged: int = 0
    n_bytes: int | None = None

    def add(self, old: torch.Tensor, new: torch.Tensor, epsilon: float | None) -> None:
        found = measure(to_numpy(old), to_numpy(new), math.inf if epsilon is None else epsilon)
        self.n_weights += old.numel()
        self.worst = max(self.worst, found.max_abs_error)
        self.square_error += found.rmse**2 * old.numel()
        self.unchanged += int((old.cpu() == new).sum())
        if epsilon is not None:
            self.beyond = (self.beyond or 0) + found.broken

    def add_expert(self, whole: TensorStats, n_bytes: int | None) -> None:
        self.n_experts += 1
        self.squares += whole.square_sum
        if n_bytes is not None:
            self.n_bytes = (self.n_bytes or 0) + n_bytes

    def realised(self) -> Realised:
        n = self.n_weights
        return Realised(
            source=self.source.id,
            bound=self.bound if self.source.needs_bound else None,
            seed=self.seed,
            n_experts=self.n_experts,
            n_weights=n,
            max_abs_error=self.worst,
            rmse=math.sqrt(self.square_error / n) if n else 0.0,
            relative_rmse=math.sqrt(self.square_error / self.squares) if self.squares else 0.0,
            beyond=None if self.beyond is None else self.beyond / n,
            unchanged=self.unchanged / n if n else 1.0,
            n_bytes=self.n_bytes,
        )
