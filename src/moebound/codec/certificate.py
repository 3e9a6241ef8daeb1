"""The record of what was promised for one tensor and what was found."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, get_args

from moebound.codec.envelope import shape_fault
from moebound.types import DType, ErrorBound, Guarantee


@dataclass(frozen=True)
class Columns:
    """Where every input channel has a bound of its own: the narrowest and the widest of them, in
    weight units, and `kept`, the largest error over its channel's bound, at most 1."""

    narrowest: float
    widest: float
    kept: float


@dataclass(frozen=True)
class Outputs:
    """What became of a matrix's outputs on a text that it was rounded by.

    tokens: that the expert saw there. error: tr((W - Ŵ) H (W - Ŵ)ᵀ), measured in float64 on the
    decoded weights, with H = Σ g² x xᵀ over these tokens: the squared error of what the matrix puts
    out, weighted as the routing weights it. promised: what that is at most (`methods/geometry.py`).
    power: tr(W H Wᵀ), the same sum of the outputs themselves.
    """

    tokens: int
    error: float
    promised: float
    power: float

    @property
    def relative(self) -> float | None:
        """Error over power; None where nothing was put out."""
        return self.error / self.power if self.power > 0 else None


@dataclass(frozen=True)
class Certificate:
    """What was promised for one matrix (or tensor), and what was found. JSON in, JSON out.

    guarantee: the level of the promise. bound: as the user stated it. abs_bound: the same in weight
    units, what every weight kept (for an rmse bound: what the encoder worked with). Both are None
    where nothing is promised.
    max_abs_error, rmse: measured in float64 on the decoded values, in `dtype`, against the
    original. method: id, its options behind a colon. codec, codec_version: whose payload it is,
    None where the method is no codec. patched: weights stored verbatim. n_bytes: of the encoded
    bytes; shared parts (store format, version 2) are counted with their own records.
    sha256_original: of the original values' bytes in their own dtype, little-endian;
    sha256_encoded: of the encoded bytes. columns, outputs: None, and not in the JSON, where there
    are no bounds by channel, or no text.
    """

    guarantee: Guarantee
    bound: ErrorBound | None
    abs_bound: float | None
    max_abs_error: float
    rmse: float
    method: str
    method_version: int
    codec: str | None
    codec_version: int | None
    dtype: DType
    source_dtype: DType
    shape: tuple[int, ...]
    patched: int
    n_bytes: int
    sha256_original: str
    sha256_encoded: str
    columns: Columns | None = None
    outputs: Outputs | None = None

    @property
    def n_weights(self) -> int:
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0

    @property
    def kept(self) -> bool:
        """Whether what was measured is within what was promised."""
        if self.columns is not None and self.columns.kept > 1:
            return False
        if self.outputs is not None and self.outputs.error > self.outputs.promised:
            return False
        if self.guarantee == "max_abs":
            return self.abs_bound is not None and self.max_abs_error <= self.abs_bound
        return self.guarantee != "lossless" or self.max_abs_error == 0

    def to_json(self) -> dict[str, Any]:
        bound = None if self.bound is None else self.bound.to_json()
        found = {**asdict(self), "bound": bound, "shape": list(self.shape)}
        for name in _OPTIONAL:
            if found[name] is None:
                del found[name]
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Certificate:
        """Also of one written before there were methods (stores of version 1)."""
        fields = dict(data)
        bound = fields["bound"]
        fields["bound"] = None if bound is None else ErrorBound.from_json(bound)
        check_types(fields, list, "shape")
        check_naturals(fields["shape"], *range(len(fields["shape"])))
        if fault := shape_fault(tuple(fields["shape"])):
            raise ValueError(fault)
        fields["shape"] = tuple(fields["shape"])
        if "guarantee" not in fields:
            fields["method"], fields["method_version"] = f"bounded:{fields['codec']}", 1
            fields["guarantee"] = promised(fields["bound"], lossy=fields["codec"] not in _EXACT)
        if fields["guarantee"] not in get_args(Guarantee):
            raise ValueError(f"guarantee {fields['guarantee']!r}: expected {get_args(Guarantee)}")
        check_types(fields, str, "method", "sha256_original", "sha256_encoded")
        check_naturals(fields, "method_version", "patched", "n_bytes")
        if fields["codec"] is not None:
            check_types(fields, str, "codec")
        if fields["codec_version"] is not None:
            check_naturals(fields, "codec_version")
        for name in ("dtype", "source_dtype"):
            if fields[name] not in get_args(DType):
                raise ValueError(f"{name} {fields[name]!r}: expected {get_args(DType)}")
        if fields["abs_bound"] is not None:
            fields["abs_bound"] = finite(fields, "abs_bound")
        # What nothing is promised of may be off by anything.
        measured = number if fields["guarantee"] == "none" else finite
        for name in ("max_abs_error", "rmse"):
            fields[name] = measured(fields, name)
        for name, kind in _OPTIONAL.items():
            if name in fields:
                fields[name] = _numbers(kind, fields[name])
        return cls(**fields)


_OPTIONAL: dict[str, type[Columns] | type[Outputs]] = {"columns": Columns, "outputs": Outputs}


def _numbers(kind: type[Columns] | type[Outputs], data: Any) -> Columns | Outputs:
    """Raises ValueError or TypeError for what `to_json` cannot have written."""
    read: dict[str, Any] = {name: finite(data, name) for name in data}
    if "tokens" in data:
        check_naturals(data, "tokens")
        read["tokens"] = data["tokens"]
    return kind(**read)


DAMAGED = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
"""What reading JSON of another form than expected raises."""


def check_types(fields: Any, kind: type, *names: Any) -> None:
    """Raises TypeError, naming the field, unless each of these is of exactly this type."""
    for name in names:
        if type(fields[name]) is not kind:
            raise TypeError(f"{name}: expected {_SPELLED[kind]}, found {fields[name]!r:.60}")


_SPELLED = {str: "a string", bool: "true or false", list: "a list", dict: "an object"}


def check_naturals(fields: Any, *names: Any) -> None:
    """Raises ValueError, naming the field, unless each of these is a whole number from 0."""
    for name in names:
        if type(fields[name]) is not int or not 0 <= fields[name] < 1 << 63:
            raise ValueError(f"{name}: expected a whole number from 0, found {fields[name]!r:.60}")


def number(fields: Any, name: str) -> float:
    """A field's number. Raises ValueError for what is none."""
    if type(fields[name]) not in (int, float):
        raise ValueError(f"{name}: expected a number, found {fields[name]!r:.60}")
    return float(fields[name])


def finite(fields: Any, name: str) -> float:
    """A field's finite number from 0. Raises ValueError for anything else."""
    value = number(fields, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number from 0, found {value}")
    return value


_EXACT = ("lossless", "raw")  # the codecs of version 1 that are


def promised(bound: ErrorBound, *, lossy: bool) -> Guarantee:
    """The level of guarantee of a codec's bytes under this bound."""
    if not lossy:
        return "lossless"
    return "max_abs" if bound.pointwise else "rmse"


def sha256(data: Any) -> str:
    """Hex digest of anything with a buffer."""
    return hashlib.sha256(data).hexdigest()
