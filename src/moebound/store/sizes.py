"""What every expert of a checkpoint would take, at every rate a plan may choose: by encoding it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from moebound.checkpoint import Checkpoint, Expert, Role, experts_name
from moebound.codec import stats, thread_count
from moebound.codec.estimate import SAMPLE_WEIGHTS
from moebound.files.formats.statistics import Statistics
from moebound.jobs.ordered import in_order
from moebound.methods import compress, get_method
from moebound.methods.bounded import Bounded
from moebound.methods.outputs import residual_errors
from moebound.plan import RATES, ExpertSizes, effective_rank
from moebound.plan.items import Floats, Ints
from moebound.store.recipe import Recipe
from moebound.store.summary import Meter, ProgressCallback
from moebound.types import Array, ErrorBound, ExpertKey, TensorStats

Found = TypeVar("Found")

NARROWEST, WIDEST = -5, 9
"""Octaves: rates of 1/32 to 512 are tried of methods that give each input channel a bound of its
own. Their rate is that of the widest channel, and most channels are far narrower."""
_AROUND, _AROUND_FISHER = 2, 5
"""Octaves to either side of the rate at which all experts together have the size that is asked:
as far as plans go, and plans by what the loss feels."""
_SAMPLE = 8
_PLAIN = "bounded:bound"
"""Whose errors sensitivity maps are of."""


def measure_sizes(
    checkpoint: Checkpoint,
    *,
    codec: str = "bound",
    ranks: bool = False,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> list[ExpertSizes]:
    """Bytes of each matrix of each routed expert at each of `RATES`, of the expert's mean |weight|.

    Within 1 % of what `compress` writes, exact for matrices of up to a million weights.
    ranks: measure effective ranks too. jobs: experts at a time, None for `MOEBOUND_THREADS` or the
    CPUs; memory is that of jobs + 1 experts.
    """
    method = Bounded.from_options(codec)

    def measure(expert: Expert) -> ExpertSizes:
        arrays = {m.role: np.ascontiguousarray(checkpoint.read(m)) for m in expert.matrices}
        whole = sum((stats(array) for array in arrays.values()), TensorStats())
        sizes = method.estimate(
            arrays, [ErrorBound(rate, "rate", "expert") for rate in RATES.tolist()]
        )
        return ExpertSizes(
            key=expert.key,
            n_weights={matrix.role: matrix.size for matrix in expert.matrices},
            sizes={str(role): found for role, found in sizes.items()},
            n_bytes=expert.n_bytes,
            mean_abs=whole.mean_abs,
            effective_rank=effective_rank(list(arrays.values())) if ranks else None,
        )

    return each_expert(checkpoint, measure, jobs, progress)


def measure_calibrated(
    checkpoint: Checkpoint,
    calibration: Statistics,
    *,
    method: str = "calibrated",
    bits_per_weight: float | None = None,
    plain_rates: Sequence[float] = (),
    known: Known | None = None,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> list[ExpertSizes]:
    """Bytes of a method that rounds by statistics, and the errors that it leaves
    (`methods.residual_errors`), a token.

    Every expert is rounded and encoded once an octave, by a sample of its rows if it is large; at
    the two rates between, a third of an octave apart, sizes lie on a line over the logarithm of the
    rate, and errors on a power of the rate. bits_per_weight: only rates that lie around it; None
    for all there are. plain_rates: of a sensitivity map, at which codec `bound` is measured too
    (`ExpertSizes.plain`). known: what earlier calls have measured of the same model, statistics and
    method, which is taken, and added to. Raises MoeboundError for statistics of another model.
    """
    calibration.check_model(experts_name(checkpoint), checkpoint.name)
    known = {} if known is None else known

    def rounded(expert: Expert, octave: int) -> Rounded:
        if (expert.key, octave) not in known:
            known[expert.key, octave] = _rounded(
                checkpoint, expert, calibration, method, 2.0**octave
            )
        return known[expert.key, octave]

    octaves = list(range(NARROWEST, WIDEST + 1))
    if bits_per_weight is not None:
        around = _AROUND_FISHER if calibration.of.fisher else _AROUND
        octaves = _around(checkpoint, rounded, bits_per_weight, around)
    at = np.array(octaves, np.float64)
    between = at[0] + np.arange(3 * (len(octaves) - 1) + 1) / 3

    def measure(expert: Expert) -> ExpertSizes:
        found = [rounded(expert, octave) for octave in octaves]
        n_tokens, tiny = max(1, calibration.of.n_tokens), np.finfo(np.float64).tiny
        sizes, errors = dict[str, Ints](), dict[str, Floats]()
        for matrix in expert.matrices:
            role = matrix.role
            measured = np.array([one.n_bytes[role] for one in found], np.float64)
            sizes[role] = np.rint(np.interp(between, at, measured)).astype(np.int64)
            lost = np.array([one.errors[role] for one in found]) / n_tokens
            logs = np.interp(between, at, np.log(np.maximum(lost, tiny)))
            errors[role] = np.where(logs > np.log(2 * tiny), np.exp(logs), 0.0)
        plain = [_rounded(checkpoint, expert, calibration, _PLAIN, rate) for rate in plain_rates]
        return ExpertSizes(
            key=expert.key,
            n_weights={matrix.role: matrix.size for matrix in expert.matrices},
            sizes=sizes,
            plain={
                matrix.role: np.array([one.errors[matrix.role] / n_tokens for one in plain])
                for matrix in expert.matrices
                if plain
            },
            n_bytes=expert.n_bytes,
            mean_abs=found[0].mean_abs,
            rates=2.0**between,
            errors=errors,
        )

    return each_expert(checkpoint, measure, jobs, progress)


@dataclass(frozen=True)
class Rounded:
    """One expert at one rate. n_bytes, errors: by role."""

    n_bytes: Mapping[Role, int]
    errors: Mapping[Role, float]
    mean_abs: float


Known = dict[tuple[ExpertKey, int], Rounded]
"""By expert, and the logarithm of the rate to the base of 2."""


def _rounded(
    checkpoint: Checkpoint, expert: Expert, calibration: Statistics, method: str, rate: float
) -> Rounded:
    bound = ErrorBound(rate, "rate", "expert")
    made = get_method(method)
    recipe = Recipe.of(bound, method, calibration)
    seen = recipe.seen(checkpoint, [expert], made)
    [view] = seen.experts
    whole = sum((stats(array) for array in view.matrices.values()), TensorStats())
    full = view.matrices
    outputs = {role: _some_outputs(array, role in view.transposed) for role, array in full.items()}
    some = {
        role: np.ascontiguousarray(
            array[:, outputs[role]] if role in view.transposed else array[outputs[role]]
        )
        for role, array in full.items()
    }
    if any(some[role].size < array.size for role, array in full.items()):
        absolute = ErrorBound(bound.absolute(whole))
        bounds = dict.fromkeys(some, absolute)
        view = replace(view, matrices=some, bounds=bounds, outputs=outputs)
        seen = replace(seen, experts=(view,))
    artifact = compress(made, seen)
    decoded = artifact.weights(expert.key)
    grown = {m.role: m.size / some[m.role].size for m in expert.matrices}
    inputs, hidden = (calibration.moments(expert.key, side) for side in ("inputs", "hidden"))
    lost = residual_errors(some, decoded, inputs, hidden, view.transposed)
    sizes = {role: len(matrix.data) for role, matrix in artifact.experts[expert.key].items()}
    return Rounded(
        {role: round(n * grown[role]) for role, n in sizes.items()},
        # Errors of gate and up are shares of what down makes of the hidden units.
        {role: error * grown["down"] for role, error in lost.items()},
        whole.mean_abs,
    )


def _around(
    checkpoint: Checkpoint,
    rounded: Callable[[Expert, int], Rounded],
    bits_per_weight: float,
    around: int,
) -> list[int]:
    """Octaves about the one at which a sample of experts has the size."""
    experts = checkpoint.experts()
    chosen = np.unique(np.linspace(0, len(experts) - 1, _SAMPLE).round().astype(int))
    n_weights: int = sum(experts[at].size for at in chosen)

    def bits(octave: int) -> float:
        sizes = [sum(rounded(experts[at], octave).n_bytes.values()) for at in chosen]
        return 8 * sum(sizes) / n_weights

    low, high = NARROWEST, WIDEST
    while low < high:  # the narrowest that is small enough
        middle = (low + high) // 2
        low, high = (low, middle) if bits(middle) <= bits_per_weight else (middle + 1, high)
    return list(range(max(NARROWEST, low - 1 - around), min(WIDEST, low + around) + 1))


def _some_outputs(array: Array, transposed: bool) -> slice:
    """Outputs at equal distances, of a matrix of more than a million weights; else all."""
    if array.size <= 2 * SAMPLE_WEIGHTS:
        return slice(None)
    step = array.size // SAMPLE_WEIGHTS
    return slice(step // 2, array.shape[1 if transposed else 0], step)


def each_expert(
    checkpoint: Checkpoint,
    measure: Callable[[Expert], Found],
    jobs: int | None,
    progress: ProgressCallback | None,
) -> list[Found]:
    """What is measured of every routed expert, in the order of the checkpoint."""
    experts = checkpoint.experts()
    meter = Meter(
        progress,
        total_bytes=sum(expert.n_bytes for expert in experts),
        total_experts=len(experts),
    )
    found = list[Found]()
    jobs = thread_count() if jobs is None else jobs
    with closing(in_order(measure, experts, jobs=jobs)) as measured:
        for expert, sizes in zip(experts, measured, strict=True):
            found.append(sizes)
            meter.add(str(expert.key), n_bytes=expert.n_bytes, experts=1)
    return found
