"""The real error of a codec in an expert: encoded, decoded, and counted in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moebound.checkpoint.families import Role
from moebound.codec import stats
from moebound.methods import BOUNDED, Artifact, ExpertView, compress_expert, get_method
from moebound.model.dtypes import arrays_of
from moebound.model.live import LiveExpert
from moebound.model.undo import Matrices
from moebound.types import Array, DType, ErrorBound, TensorStats


@dataclass(frozen=True, eq=False)
class Original:
    """An expert as it would stand in its checkpoint: arrays by role, [out, in]."""

    expert: LiveExpert
    arrays: dict[Role, Array]
    stats: dict[Role, TensorStats]

    @classmethod
    def of(cls, expert: LiveExpert, dtype: DType | None = None) -> Original:
        """dtype: of the checkpoint; found out from the values if None."""
        arrays = arrays_of(expert.matrices, dtype)
        return cls(expert, arrays, {role: stats(array) for role, array in arrays.items()})

    @property
    def whole(self) -> TensorStats:
        return sum(self.stats.values(), TensorStats())

    def made(self, method: str, bounds: Mapping[Role, ErrorBound] | None = None) -> Artifact:
        """The expert, made smaller. method: its setting. bounds: of each matrix; one of scope
        "expert" is relative to the whole expert (MoE-Compression, 2509.07727, section 3.1).

        Raises as `methods.compress`; MethodError for a method that looks at more than one expert.
        """
        return compress_expert(get_method(method), ExpertView(self.expert.key, self.arrays, bounds))

    def decoded(
        self, bounds: Mapping[Role, ErrorBound], codec: str
    ) -> tuple[Matrices, dict[Role, int]]:
        """The weights after the codec, in the model's dtype, and the bytes of each matrix."""
        artifact = self.made(f"{BOUNDED}:{codec}", bounds)
        found = artifact.experts[self.expert.key]
        sizes = {role: len(matrix.data) for role, matrix in found.items()}
        return as_live(self.expert, artifact.weights(self.expert.key)), sizes

    def decoded_at(self, rate: float, codec: str) -> tuple[Matrices, dict[Role, int]]:
        """The same with one bound for all: so much times the expert's mean |weight|."""
        bound = ErrorBound(rate, "rate", "expert")
        return self.decoded(dict.fromkeys(self.arrays, bound), codec)


def as_live(expert: LiveExpert, weights: Mapping[Role, Array]) -> Matrices:
    """What an expert decodes to, in the model's dtype, on its device."""
    live = expert.matrices
    return {
        role: torch.from_numpy(decoded.astype(np.float32)).to(live[role])
        for role, decoded in weights.items()
    }


def originals(experts: Sequence[LiveExpert]) -> list[Original]:
    return [Original.of(expert) for expert in experts]
