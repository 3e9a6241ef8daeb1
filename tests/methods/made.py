"""Methods of other people, in a few lines each: what the tests of the house hold against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest

from moebound.checkpoint import Role
from moebound.files.formats.statistics import RATIOS
from moebound.methods import (
    Encoding,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    RouterEdit,
    SharedPayload,
)
from moebound.methods.registry import METHODS
from moebound.types import Array, ExpertKey


class Plain(Method):
    """Weights as they are, in float32. `edit` and `zero` make experts that compute nothing."""

    id: ClassVar[str] = "plain"
    lossless: ClassVar[bool] = True

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        edit = self.edit(group)
        return Encoding(
            {
                expert.key: {
                    role: Payload(b"" if self.zero(expert.key, edit) else _bytes(matrix))
                    for role, matrix in expert.matrices.items()
                }
                for expert in group.experts
            },
            router=edit,
        )

    def edit(self, group: GroupView) -> RouterEdit | None:
        return None

    def zero(self, key: ExpertKey, edit: RouterEdit | None) -> bool:
        return False

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        if not len(payload):
            return np.zeros(spec.shape, np.float32)
        return np.frombuffer(payload, "<f4").reshape(spec.shape)


class KeepTwo(Plain):
    """The first two experts of each layer; the router never chooses another."""

    id: ClassVar[str] = "keep_two"
    scope = "layer"
    lossless: ClassVar[bool] = False
    edits_router: ClassVar[bool] = True

    def edit(self, group: GroupView) -> RouterEdit | None:
        return RouterEdit(group.layer, keep=(0, 1))

    def zero(self, key: ExpertKey, edit: RouterEdit | None) -> bool:
        return key.expert > 1


class OneIsZero(Plain):
    """Expert 1 computes what expert 0 does."""

    id: ClassVar[str] = "one_is_zero"
    scope = "layer"
    lossless: ClassVar[bool] = False
    edits_router: ClassVar[bool] = True

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        found = super().encode(group)
        first, second = (expert.key for expert in group.experts[:2])
        return Encoding({**found.matrices, second: found.matrices[first]}, router=found.router)

    def edit(self, group: GroupView) -> RouterEdit | None:
        return RouterEdit(group.layer, alias={1: 0})


class Constant(Plain):
    """Experts 1 and 3 put out a vector."""

    id: ClassVar[str] = "constant"
    scope = "layer"
    lossless: ClassVar[bool] = False
    edits_router: ClassVar[bool] = True

    def edit(self, group: GroupView) -> RouterEdit | None:
        down = group.experts[0].matrices["down"]
        values = np.linspace(-1, 1, down.shape[0], dtype=np.float32)
        return RouterEdit(group.layer, constants={1: values, 3: -2 * values})

    def zero(self, key: ExpertKey, edit: RouterEdit | None) -> bool:
        return key.expert in (1, 3)


class MeanAndRest(Method):
    """The layer's mean of each projection, shared, and what each expert differs from it by."""

    id: ClassVar[str] = "mean_rest"
    scope = "layer"

    def n_shared(self, roles: Sequence[Role]) -> int:
        return len(roles)

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        roles = list(group.experts[0].matrices)
        means = {
            role: np.mean([e.matrices[role].astype(np.float32) for e in group.experts], axis=0)
            for role in roles
        }
        return Encoding(
            {
                expert.key: {
                    role: Payload(
                        (matrix.astype(np.float32) - means[role]).astype("<f2").tobytes(),
                        uses=(roles.index(role),),
                    )
                    for role, matrix in expert.matrices.items()
                }
                for expert in group.experts
            },
            shared=[SharedPayload(_bytes(mean), mean.nbytes) for mean in means.values()],
        )

    @classmethod
    def open_shared(cls, payload: memoryview) -> Any:
        return np.frombuffer(payload, "<f4")

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        rest = np.frombuffer(payload, "<f2").astype(np.float32)
        found: Array = (shared[0] + rest).reshape(spec.shape)
        return found


def _bytes(matrix: Array) -> bytes:
    return matrix.astype("<f4").tobytes()


ALL: tuple[type[Method], ...] = (Plain, KeepTwo, OneIsZero, Constant, MeanAndRest)


@contextmanager
def known(*methods: type[Method]) -> Iterator[None]:
    """These can be asked for by their ids, as if their package was installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS, "classes", {**METHODS.classes, **{m.id: m for m in methods}})
        yield


def routed(n: int, width: int) -> tuple[Array, ...]:
    """What `Chunk` has of n experts' routing behind their outputs: nothing was sent to them."""
    return (
        np.zeros(n, np.int64), np.zeros(n), np.zeros(n), np.zeros((n, 2, width)),
        np.zeros((n, RATIOS), np.int64),
    )  # fmt: skip
