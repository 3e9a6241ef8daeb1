"""Quantizers that look at one matrix at a time, as [out, in], with the second moments of its
inputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from moebound.checkpoint import Role
from moebound.errors import MethodError
from moebound.files.formats.statistics import Side
from moebound.methods.base import Encoding, GroupView, Method, Payload
from moebound.methods.one_thread import one_thread
from moebound.methods.outputs import side_of, turned
from moebound.types import Array, ExpertKey


class Upright(Method):
    """What they have in common: `encode`. of: what stands behind "inputs" and "hidden" in the names
    of the second moments that are asked for."""

    of: ClassVar[str] = ""

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        found: dict[ExpertKey, dict[Role, Payload]] = {}
        with one_thread():
            for expert in group.experts:
                found[expert.key] = {}
                for role, matrix in expert.matrices.items():
                    moments = self._moments(group, expert.key, side_of(role))
                    flip = role in expert.transposed
                    if moments is not None:
                        flip = turned(matrix, len(moments), flip)
                    upright = np.ascontiguousarray(matrix.T if flip else matrix, np.float32)
                    if moments is not None and len(moments) != upright.shape[1]:
                        raise MethodError(
                            f"{expert.key}: {role}: inputs of {upright.shape[1]} channels, and "
                            f"statistics of {len(moments)}; expected statistics of this model"
                        )
                    if not upright.size or not np.isfinite(upright).all():
                        raise MethodError(
                            f"{expert.key}: {role}: no weights, or one that is not finite"
                        )
                    found[expert.key][role] = Payload(self.payload(upright, moments, flip))
        return Encoding(found)

    def _moments(self, group: GroupView, key: ExpertKey, side: Side) -> Array | None:
        name = side + self.of
        return group.statistics[name][key] if name in self.statistics else None

    @abstractmethod
    def payload(self, matrix: Array, moments: Array | None, flip: bool) -> bytes:
        """Of a matrix [O, N] float32, finite. moments: H of its inputs, [N, N], or its diagonal;
        None where the method asks for none. flip: whether the checkpoint has it as [N, O]."""
