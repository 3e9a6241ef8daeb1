"""What is written can be read again: methods that say too much are refused when they encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from moebound.errors import MethodError
from moebound.methods import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    SharedPayload,
    compress,
)
from moebound.types import Array, ExpertKey

KEY = ExpertKey(0, 0)
GROUP = GroupView((ExpertView(KEY, {"gate": np.ones((4, 8), np.float16)}),))


class Ones(Method):
    id: ClassVar[str] = "ones"
    parts: ClassVar[int] = 0
    held: ClassVar[int] = 0

    def n_shared(self, roles: Sequence[str]) -> int:
        return self.parts

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        payload = Payload(b"", tuple(range(self.parts)))
        return Encoding({KEY: {"gate": payload}}, [SharedPayload(b"", self.held)] * self.parts)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        return np.ones(spec.shape, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "Ones"}, r"id 'Ones', version 1: expected 1 to 32 of a-z"),
        ({"id": "my-ones"}, r"id 'my-ones'"),
        ({"id": "o" * 33}, r"version 1: expected 1 to 32"),
        ({"version": 256}, r"version 256: .* 0 to 255"),
        ({"parts": 65}, "65 shared parts: at most 64"),
        ({"parts": 1, "held": -1}, "held_bytes -1: expected 0 or more"),
        (
            {"most_weights": classmethod(lambda cls, n_bytes: 31)},
            "0 bytes of 32 weights, it says of at most 31",
        ),
    ],
)
def test_what_no_reader_would_take(changes: dict[str, Any], message: str) -> None:
    method = type("Changed", (Ones,), changes)()
    with pytest.raises(MethodError, match=message):
        compress(method, GROUP)


def test_what_readers_take() -> None:
    for changes in ({}, {"id": "o" * 32, "version": 255}, {"parts": 64}):
        artifact = compress(type("Fine", (Ones,), changes)(), GROUP)
        assert artifact.max_abs_error == 0
