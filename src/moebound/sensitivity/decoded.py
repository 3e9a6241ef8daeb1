"""The real error of a codec in an expert: encoded, decoded, and counted in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moebound.checkpoint.families import Role
from moebound.codec import decode_array, encode_certified, parse, stats
from moebound.codec.arrays import to_numpy
from moebound.model.live import LiveExpert
from moebound.model.undo import Matrices
from moebound.sensitivity.noise import TORCH_DTYPES, stored_dtype
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
        weights = expert.matrices
        stored = TORCH_DTYPES[dtype or stored_dtype(weights)]
        arrays = {role: to_numpy(matrix.to(stored)) for role, matrix in weights.items()}
        return cls(expert, arrays, {role: stats(array) for role, array in arrays.items()})

    @property
    def whole(self) -> TensorStats:
        return sum(self.stats.values(), TensorStats())

    def decoded(
        self, bounds: Mapping[Role, ErrorBound], codec: str
    ) -> tuple[Matrices, dict[Role, int]]:
        """The weights after the codec, in the model's dtype, and the bytes of each matrix.

        bounds: of each matrix; one of scope "expert" is relative to the whole expert
        (MoE-Compression, 2509.07727, section 3.1). Raises as `moebound.encode`.
        """
        weights: Matrices = {}
        n_bytes: dict[Role, int] = {}
        live = self.expert.matrices
        for role, array in self.arrays.items():
            reference = self.whole if bounds[role].scope == "expert" else None
            data = encode_certified(array, bounds[role], codec=codec, reference=reference).data
            values = decode_array(parse(data), threads=1).astype(np.float32)
            weights[role] = torch.from_numpy(values).to(live[role])
            n_bytes[role] = len(data)
        return weights, n_bytes

    def decoded_at(self, rate: float, codec: str) -> tuple[Matrices, dict[Role, int]]:
        """The same with one bound for all: so much times the expert's mean |weight|."""
        bound = ErrorBound(rate, "rate", "expert")
        return self.decoded(dict.fromkeys(self.arrays, bound), codec)


def originals(experts: Sequence[LiveExpert]) -> list[Original]:
    return [Original.of(expert) for expert in experts]
