"""A bound on every weight, kept by a codec: `bounded:bound`, `bounded:sz3:interp`, ...

Each matrix becomes an envelope of its own (docs/format.md). A bound of scope "expert" is relative
to all matrices of the expert together (MoE-Compression, 2509.07727, section 3.1). An exact codec
(`lossless`, `raw`) takes a bound and does not need one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from moebound.checkpoint import Role
from moebound.codec import Encoded, encode_certified, estimate_bytes, get_codec, stats
from moebound.errors import CorruptionError
from moebound.methods.artifact import named
from moebound.methods.base import Encoding, ExpertView, GroupView, MatrixSpec, Method
from moebound.types import Array, ErrorBound, TensorStats

_EXACT = ErrorBound(math.ulp(0.0))
"""What stands for "no bound" where an exact codec is asked: the smallest there is."""


@dataclass(frozen=True)
class Bounded(Method):
    """codec: an id, options behind a colon."""

    id: ClassVar[str] = "bounded"
    takes_bound: ClassVar[bool] = True
    codec: str = "bound"

    @classmethod
    def from_options(cls, options: str) -> Self:
        """Raises CodecError, BackendUnavailable as `get_codec`."""
        codec = options or "bound"
        get_codec(codec)
        return cls(codec)

    @property
    def setting(self) -> str:
        return f"{self.id}:{self.codec}"

    @property
    def needs_bound(self) -> bool:
        return get_codec(self.codec).lossy

    @property
    def needs(self) -> tuple[str, ...]:
        return get_codec(self.codec).needs

    @property
    def versions(self) -> tuple[int, ...]:
        return (self.version, get_codec(self.codec).version)

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        return Encoding({expert.key: self._encode(expert, threads) for expert in group.experts})

    def _encode(self, expert: ExpertView, threads: int) -> dict[Role, Encoded]:
        codec, bounds = get_codec(self.codec), expert.bounds
        whole = reference(expert.matrices, bounds)
        found: dict[Role, Encoded] = {}
        for role, array in expert.matrices.items():
            bound = _EXACT if bounds is None else bounds[role]
            together = whole if bound.scope == "expert" else None
            with named(f"{expert.key}, {role}"):
                encoded = encode_certified(
                    array, bound, codec=codec, reference=together, threads=threads
                )
            if bounds is None:
                free = replace(encoded.certificate, bound=None, abs_bound=None)
                encoded = replace(encoded, certificate=free)
            found[role] = encoded
        return found

    def estimate(
        self, matrices: Mapping[Role, Array], bounds: Sequence[ErrorBound]
    ) -> dict[Role, npt.NDArray[np.int64]]:
        """Bytes of each matrix of an expert under each bound, envelopes whole, without encoding
        most of them. Within 1 % (`codec.estimate`), exact for up to a million weights."""
        whole = sum((stats(array) for array in matrices.values()), TensorStats())
        return {
            role: estimate_bytes(
                array,
                [b.absolute(whole if b.scope == "expert" else stats(array)) for b in bounds],
                codec=self.codec,
            )
            for role, array in matrices.items()
        }

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        raise CorruptionError("envelopes stand for themselves; no blob has this method")


def reference(
    matrices: Mapping[Role, Array], bounds: Mapping[Role, ErrorBound] | None
) -> TensorStats | None:
    """What bounds of scope "expert" are relative to: all matrices together. Costs a pass over the
    weights, and is None where no bound asks for it."""
    if bounds is None or all(bound.scope != "expert" for bound in bounds.values()):
        return None
    return sum((stats(array) for array in matrices.values()), TensorStats())
