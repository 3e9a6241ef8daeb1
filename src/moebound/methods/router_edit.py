"""What a method does to a layer's routing, as data: loaders apply it, stores keep it.

keep       the experts that may still be chosen; the others are never, and the weights of those
           that are chosen are as if only they had been there
alias      expert -> the expert that computes in its place (merging)
constants  expert -> the vector that it puts out whatever goes in (MoNE)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moebound.errors import CorruptionError, MethodError

_VECTORS = "<f4"


@dataclass(frozen=True, eq=False)
class RouterEdit:
    """Of one layer. Numbers are those of its routed experts. constants: [H] float32 each.

    Raises MethodError for an edit that contradicts itself: an alias or a constant of an expert that
    is never chosen, an alias of an alias, an expert that is both.
    """

    layer: int
    keep: tuple[int, ...] | None = None
    alias: Mapping[int, int] = field(default_factory=dict)
    constants: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"router edit of layer {self.layer}"
        kept = None if self.keep is None else set(self.keep)
        if kept is not None and (not kept or len(kept) < len(self.keep or ())):
            raise MethodError(f"{where}: keep: expected different experts, found {self.keep}")
        for name, experts in (("alias", self.alias), ("constants", self.constants)):
            gone = sorted(set(experts) - kept) if kept is not None else []
            if gone:
                raise MethodError(f"{where}: {name}: expert {gone[0]} is never chosen")
        if twice := sorted(set(self.alias) & set(self.constants)):
            raise MethodError(f"{where}: expert {twice[0]} is an alias and a constant")
        for expert, target in self.alias.items():
            if target in self.alias or target in self.constants or expert == target:
                raise MethodError(f"{where}: alias of {expert}: {target} is none that computes")
        if len({vector.shape for vector in self.constants.values()}) > 1:
            raise MethodError(f"{where}: constants of different lengths")

    @property
    def is_empty(self) -> bool:
        return self.keep is None and not self.alias and not self.constants

    def describe(self) -> dict[str, Any]:
        """For people and certificates: everything but the vectors' values."""
        return {
            "layer": self.layer,
            "keep": None if self.keep is None else list(self.keep),
            "alias": {str(expert): target for expert, target in sorted(self.alias.items())},
            "constants": sorted(self.constants),
        }

    def to_bytes(self) -> bytes:
        """A line of JSON (`describe`), then the vectors, float32 little-endian."""
        head = json.dumps(self.describe(), separators=(",", ":")).encode() + b"\n"
        vectors = [self.constants[expert] for expert in sorted(self.constants)]
        return head + b"".join(np.ascontiguousarray(v, _VECTORS).tobytes() for v in vectors)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> RouterEdit:
        """Raises CorruptionError for anything that `to_bytes` cannot have made."""
        head, newline, rest = bytes(data).partition(b"\n")
        try:
            found = json.loads(head)
            numbers = [_index(number) for number in found["constants"]]
            keep = found["keep"]
            if numbers != sorted(set(numbers)):
                raise ValueError(f"constants {numbers}: expected different experts, ascending")
            if not newline or (len(rest) % (4 * len(numbers)) if numbers else len(rest)):
                raise ValueError(f"{len(rest)} bytes of {len(numbers)} constants")
            values = list(np.frombuffer(rest, _VECTORS).reshape(max(1, len(numbers)), -1))
            return cls(
                _index(found["layer"]),
                None if keep is None else tuple(_index(number) for number in keep),
                {_named(k): _index(v) for k, v in found["alias"].items()},
                dict(zip(numbers, values, strict=False)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CorruptionError(f"router edit: {type(error).__name__}: {error}") from error


def _named(key: str) -> int:
    number = _index(int(key))
    if str(number) != key:  # "01" and "1" would be one expert
        raise ValueError(f"expected an expert's number, found {key!r}")
    return number


def _index(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected an expert's or layer's number, found {value!r}")
    return value
