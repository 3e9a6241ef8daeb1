"""Error sources: what becomes of an expert's weights, by simulation or by a real codec.

With ε the bound in weight units (`ErrorBound.absolute`; for the paper's rate α that is
α · ‖θ‖₁ / n over the whole expert, MoE-Compression, 2509.07727, section 3.1):

  gaussian-sd      W + N(0, ε²): the paper's N(0, ê), with ê read as the standard deviation
  gaussian-var     W + N(0, ε): the same with ê read as the variance, in (weight unit)²
  gaussian-power   W + N(0, ε²/3): a Gaussian with the power of an error uniform in the bound
  uniform          W + U(-ε, ε): what a uniform quantizer with many bins per weight leaves
  randomise        N(mean W, var W), a fresh matrix: the paper's "fully randomised" (section 3.2.1)
  codec:ID         encoded and decoded by a real codec, as in a store: `codec:sz3:interp`
  METHOD           the same by any method that looks at one expert at a time: `rtn:int4:g64`

Draws come from a stream of their own for every (seed, layer, expert, projection), so the noise of
an expert is the same whichever other experts are perturbed, and in whichever order. The stream
does not depend on bound or source: gaussian-sd at two bounds is the same noise in two sizes, which
takes the draw out of the difference between them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from moebound.checkpoint.families import ROLE_ORDER, Role
from moebound.codec import codec_ids, get_codec, stats, thread_count
from moebound.codec.arrays import to_numpy
from moebound.errors import BoundError, MoeboundError
from moebound.extras import check
from moebound.methods import (
    BOUNDED,
    ExpertView,
    codec_of,
    compress_expert,
    get_method,
    method_ids,
)
from moebound.model.dtypes import arrays_of
from moebound.types import DType, ErrorBound, ExpertKey, TensorStats

Generators = Callable[[Role], np.random.Generator]
"""Role -> the stream of draws of that matrix, from its beginning."""

CODEC_PREFIX = "codec:"
_MANY_WEIGHTS = 1 << 18  # below it, a second thread costs a codec more than it brings


@dataclass(frozen=True)
class Changed:
    """What a source made of one expert.

    matrices: the new weights by role, float32 on the CPU, before any cast to the model's dtype.
    epsilons: the bound of each in weight units, or None where the source knows no bound.
    n_bytes: what the codec needs for all of them, None for a simulated error.
    """

    matrices: Mapping[Role, torch.Tensor]
    epsilons: Mapping[Role, float] | None
    n_bytes: int | None = None


class ErrorSource(ABC):
    """One way to change weights. Instances are small, frozen and comparable.

    seeded: whether it is drawn, so that another seed gives another error. simulated: False for a
    codec that really runs.
    """

    seeded: ClassVar[bool] = True
    simulated: ClassVar[bool] = True

    @property
    @abstractmethod
    def id(self) -> str:
        """What `parse_source` makes this source of."""

    @property
    def needs_bound(self) -> bool:
        """Whether the error has a size, which a bound sets."""
        return True

    @property
    def needs(self) -> tuple[str, ...]:
        """Modules of `extras.PACKAGES` that it cannot do without."""
        return ()

    def check_installed(self) -> None:
        """Make sure that the library behind it is there. Raises BackendUnavailable."""
        check(f"error source {self.id}", *self.needs)

    def apply(
        self,
        weights: Mapping[Role, torch.Tensor],
        bound: ErrorBound | None,
        expert_stats: TensorStats,
        generators: Generators,
        *,
        dtype: DType | None = None,
    ) -> Changed:
        """The weights with the error in them.

        weights: by role, [out, in], any device, bfloat16, float16 or float32; not changed.
        expert_stats: of all of them together, what a bound of scope "expert" is relative to.
        dtype: of the weights in their checkpoint, None to find out; only codecs ask.

        Raises BoundError if a bound is needed and there is none.
        """
        if bound is None and self.needs_bound:
            raise BoundError(f"error source {self.id!r} needs a bound, found none")
        epsilons = None
        if bound is not None and self.needs_bound:
            epsilons = {role: _epsilon(bound, w, expert_stats) for role, w in weights.items()}
        return self._apply(weights, bound, expert_stats, epsilons, generators, dtype)

    def _apply(
        self,
        weights: Mapping[Role, torch.Tensor],
        bound: ErrorBound | None,
        expert_stats: TensorStats,
        epsilons: Mapping[Role, float] | None,
        generators: Generators,
        dtype: DType | None,
    ) -> Changed:
        changed = {
            role: self.draw(w.float().cpu(), epsilons[role] if epsilons else 0.0, generators(role))
            for role, w in weights.items()
        }
        return Changed(changed, epsilons)

    def draw(
        self, weights: torch.Tensor, epsilon: float, generator: np.random.Generator
    ) -> torch.Tensor:
        """New weights, float32, of one matrix of float32 weights on the CPU."""
        raise NotImplementedError(f"{self.id}: not drawn matrix by matrix")

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Gaussian(ErrorSource):
    """Independent Gaussian errors around the weights. reading: what ε says about their width."""

    reading: str

    @property
    def id(self) -> str:
        return f"gaussian-{self.reading}"

    def standard_deviation(self, epsilon: float) -> float:
        if self.reading == "var":
            return math.sqrt(epsilon)
        return epsilon / math.sqrt(3.0) if self.reading == "power" else epsilon

    def draw(
        self, weights: torch.Tensor, epsilon: float, generator: np.random.Generator
    ) -> torch.Tensor:
        return weights + self.standard_deviation(epsilon) * _normal(weights, generator)


@dataclass(frozen=True)
class Uniform(ErrorSource):
    """Independent errors, uniform within the bound (float32 rounding of the sum aside)."""

    @property
    def id(self) -> str:
        return "uniform"

    def draw(
        self, weights: torch.Tensor, epsilon: float, generator: np.random.Generator
    ) -> torch.Tensor:
        unit = torch.from_numpy(generator.random(tuple(weights.shape), dtype=np.float32))
        return weights + epsilon * (2.0 * unit - 1.0)


@dataclass(frozen=True)
class Randomise(ErrorSource):
    """Nothing is left of a matrix but its mean and its standard deviation."""

    @property
    def id(self) -> str:
        return "randomise"

    @property
    def needs_bound(self) -> bool:
        return False

    def draw(
        self, weights: torch.Tensor, epsilon: float, generator: np.random.Generator
    ) -> torch.Tensor:
        spread = weights.double().std(correction=0) if weights.numel() else 0.0
        centre = weights.double().mean() if weights.numel() else 0.0
        return (float(centre) + float(spread) * _normal(weights, generator).double()).float()


@dataclass(frozen=True)
class MethodSource(ErrorSource):
    """A method that really runs: encoded and decoded, with the bytes counted.

    Each matrix becomes a blob or an envelope of its own, [out, in], in the dtype of the checkpoint,
    so errors are those after the cast to it and the bytes are those of a store. (Families that
    store several projections in one tensor differ a little: there a store encodes the whole
    tensor.)

    setting: the method's, as `get_method` takes it.
    """

    setting: str
    seeded: ClassVar[bool] = False
    simulated: ClassVar[bool] = False

    @property
    def id(self) -> str:
        codec = codec_of(self.setting)
        return self.setting if codec is None else CODEC_PREFIX + codec

    @property
    def needs_bound(self) -> bool:
        return get_method(self.setting).needs_bound

    @property
    def needs(self) -> tuple[str, ...]:
        return get_method(self.setting).needs

    def _apply(
        self,
        weights: Mapping[Role, torch.Tensor],
        bound: ErrorBound | None,
        expert_stats: TensorStats,
        epsilons: Mapping[Role, float] | None,
        generators: Generators,
        dtype: DType | None,
    ) -> Changed:
        method = get_method(self.setting)
        arrays = arrays_of(weights, dtype)
        bounds = None
        if bound is not None and method.needs_bound:
            bounds = {role: _own_bound(bound, (epsilons or {}).get(role)) for role in arrays}
        most = max((array.size for array in arrays.values()), default=0)
        threads = thread_count() if most >= _MANY_WEIGHTS else 1
        view = ExpertView(_ANY, arrays, bounds)
        artifact = compress_expert(method, view, threads=threads)
        changed = {
            role: torch.from_numpy(decoded.astype(np.float32))
            for role, decoded in artifact.weights(_ANY).items()
        }
        return Changed(changed, epsilons, artifact.n_bytes)


_ANY = ExpertKey(0, 0)
"""The key of an expert whose place does not matter."""


def _own_bound(bound: ErrorBound, epsilon: float | None) -> ErrorBound:
    """A bound that is relative to the whole expert, in weight units; here only a part of the expert
    may be given. Of weights that are all 0 it stays what it is: an exact copy."""
    return ErrorBound(epsilon) if bound.scope == "expert" and epsilon else bound


_SIMULATED: dict[str, ErrorSource] = {
    source.id: source
    for source in (Gaussian("sd"), Gaussian("var"), Gaussian("power"), Uniform(), Randomise())
}


def parse_source(text: str | ErrorSource) -> ErrorSource:
    """The source of an id: one of `source_ids()`, with the options of its codec or method.

    Raises MoeboundError with the ids there are, CodecError or MethodError for an unknown option.
    """
    if isinstance(text, ErrorSource):
        return text
    if text in _SIMULATED:
        return _SIMULATED[text]
    if text.startswith(CODEC_PREFIX):
        name = text.removeprefix(CODEC_PREFIX)
        get_codec(name)
        return MethodSource(f"{BOUNDED}:{name}")
    if text.partition(":")[0] in method_ids():
        return MethodSource(get_method(text).setting)
    raise MoeboundError(
        f"error source {text!r}: unknown. There are {', '.join(source_ids())}; "
        "a codec takes options, as in codec:sz3:interp; and methods, as in rtn:int4:g64"
    )


def source_ids() -> list[str]:
    """Every source that can be asked for here: the simulated ones, then the codecs. Methods that
    take options (`rtn:int4:g64`) are sources, too."""
    return [*_SIMULATED, *(CODEC_PREFIX + name for name in codec_ids())]


def generators_for(seed: int, key: ExpertKey) -> Generators:
    """The streams of one expert: a function of (seed, layer, expert, projection), nothing else.

    Raises MoeboundError for a negative seed.
    """
    if seed < 0:
        raise MoeboundError(f"seed {seed}: expected a whole number, 0 or above")

    def stream(role: Role) -> np.random.Generator:
        entropy = [seed, key.layer, key.expert, int(key.shared), ROLE_ORDER.index(role)]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    return stream


def matrix_stats(weights: torch.Tensor) -> TensorStats:
    """Statistics of one matrix, any device."""
    return stats(to_numpy(weights))


def _epsilon(bound: ErrorBound, weights: torch.Tensor, expert_stats: TensorStats) -> float:
    if bound.mode == "abs":
        return bound.value
    return bound.absolute(expert_stats if bound.scope == "expert" else matrix_stats(weights))


def _normal(weights: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(tuple(weights.shape), dtype=np.float32))
