"""Calibration statistics: what the experts of a model get as inputs on some text. A folder.

    statistics.json                  what it is of; written last: a folder without it is unfinished
    layer-00003-00000.safetensors    experts 0 and on of decoder layer 3

A file of E experts, whose inputs have N channels and whose hidden values M, has

    tokens    [E] int64, tokens that were sent to each expert
    gates     [E] float64, sum over them of g, the weight that the expert's output is multiplied
              by
    inputs    [E, N(N+1)/2] float32, H = sum of g² x xᵀ over its inputs x: the upper triangle, row
              by row; [E, N] the diagonal alone, if `moments` says so
    hidden    the same of what its down projection gets, by M
    outputs   [E, 2, N] float32, sum of g f(x) and of its square, by channel of its output f(x)

Sums, not means: those of two texts can be added.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors
from safetensors.numpy import save as to_safetensors

from moebound.errors import FormatError, MoeboundError
from moebound.files.documents import Format, count, fields_of, items, save_json
from moebound.files.durable import save_bytes
from moebound.types import Array, ExpertKey

FORMAT = Format("moebound.statistics", 1)
FILE = "statistics.json"
Moments = Literal["full", "diagonal"]
Side = Literal["inputs", "hidden"]
"""Whose second moments: of what gate and up get, or of what down gets."""

_MOST = 1 << 24


@dataclass(frozen=True)
class Part:
    """One file: whose experts it has. first: the first of them."""

    layer: int
    first: int
    n_experts: int
    file: str

    @classmethod
    def of(cls, layer: int, first: int, n_experts: int) -> Part:
        """With the name that is given to it."""
        return cls(layer, first, n_experts, f"layer-{layer:05d}-{first:05d}.safetensors")


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one file has: arrays as in the module's docstring."""

    part: Part
    tokens: Array
    gates: Array
    inputs: Array
    hidden: Array
    outputs: Array

    def save(self, folder: Path) -> None:
        """Raises StoreError if the disk refuses."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _SPELLED}
        save_bytes(folder / self.part.file, to_safetensors(arrays))


@dataclass(frozen=True)
class Of:
    """What statistics are of. fingerprint: of its experts (`checkpoint.corners`).
    text: a task's or file's name. text_sha256: of the token ids. routed: whether experts saw the
    tokens that were sent to them, or all of them. width: N; inner: M."""

    model: str
    fingerprint: str
    text: str
    text_sha256: str
    n_sequences: int
    n_tokens: int
    routed: bool
    moments: Moments
    width: int
    inner: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Statistics:
    """A finished folder. Arrays are read when they are asked for."""

    folder: Path
    of: Of
    parts: tuple[Part, ...]

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        return tuple(
            ExpertKey(part.layer, part.first + index)
            for part in self.parts
            for index in range(part.n_experts)
        )

    @property
    def n_bytes(self) -> int:
        return sum((self.folder / part.file).stat().st_size for part in self.parts)

    def tokens(self) -> dict[ExpertKey, int]:
        """How many tokens each expert saw."""
        return {
            ExpertKey(part.layer, part.first + index): int(n)
            for part in self.parts
            for index, n in enumerate(self._read(part, "tokens"))
        }

    def moments(self, key: ExpertKey, side: Side) -> Array:
        """H of one expert, float64: [N, N], or [N] where only the diagonal was kept."""
        part = self._part(key)
        row = self._read(part, side, key.expert - part.first).astype(np.float64)
        if self.of.moments == "diagonal":
            return row
        n = self.of.width if side == "inputs" else self.of.inner
        found = np.zeros((n, n))
        found[np.triu_indices(n)] = row
        return found + np.triu(found, 1).T

    def wanted(
        self, names: Collection[str], keys: Sequence[ExpertKey]
    ) -> dict[str, dict[ExpertKey, Array]]:
        """What a method asks for of these experts, by the names it asks for."""
        sides: tuple[Side, ...] = get_args(Side)
        return {side: {k: self.moments(k, side) for k in keys} for side in sides if side in names}

    def outputs(self, key: ExpertKey) -> Array:
        """[2, N] float64: sum of g f(x), and of its square."""
        part = self._part(key)
        return self._read(part, "outputs", key.expert - part.first).astype(np.float64)

    def gates(self, key: ExpertKey) -> float:
        part = self._part(key)
        return float(self._read(part, "gates")[key.expert - part.first])

    def check_model(self, fingerprint: str, model: str) -> None:
        """Raises MoeboundError unless they are of this model."""
        if fingerprint != self.of.fingerprint:
            raise MoeboundError(
                f"{self.folder}: statistics of {self.of.model}, and {model} has other weights; "
                "make them anew with `moebound calibrate`, in float32 or the checkpoint's dtype"
            )

    def _part(self, key: ExpertKey) -> Part:
        for part in self.parts:
            here = 0 <= key.expert - part.first < part.n_experts
            if part.layer == key.layer and here and not key.shared:
                return part
        raise MoeboundError(f"{self.folder}: has no statistics of {key}; it has routed experts")

    def _read(self, part: Part, name: str, row: int | None = None) -> Array:
        """One array, or one row of it. Raises FormatError, naming the file, for damage."""
        path = self.folder / part.file
        try:
            with safetensors.safe_open(path, "np") as file:
                there = file.get_slice(name)
                expected = self._shape(part, name)
                if tuple(there.get_shape()) != expected or there.get_dtype() != _SPELLED[name]:
                    raise FormatError(
                        f"{path}, {name}: expected {_SPELLED[name]} {expected}, found "
                        f"{there.get_dtype()} {tuple(there.get_shape())}"
                    )
                found: Array = there[:] if row is None else there[row : row + 1][0]
        except (OSError, safetensors.SafetensorError) as error:
            raise FormatError(f"{path}: cannot be read: {error}") from error
        if not np.isfinite(found).all():
            raise FormatError(f"{path}, {name}: has values that are not finite")
        return found

    def _shape(self, part: Part, name: str) -> tuple[int, ...]:
        e, n, m = part.n_experts, self.of.width, self.of.inner
        full = self.of.moments == "full"
        return {
            "tokens": (e,),
            "gates": (e,),
            "inputs": (e, packed_size(n) if full else n),
            "hidden": (e, packed_size(m) if full else m),
            "outputs": (e, 2, n),
        }[name]


_SPELLED = {"tokens": "I64", "gates": "F64", "inputs": "F32", "hidden": "F32", "outputs": "F32"}


def packed_size(n: int) -> int:
    """Numbers of the upper triangle of an n x n matrix."""
    return n * (n + 1) // 2


def save_statistics(folder: Path, of: Of, parts: Sequence[Part]) -> None:
    """Write what makes a folder of finished parts whole."""
    document = FORMAT.header | of.to_json() | {"parts": [dict(vars(part)) for part in parts]}
    save_json(folder / FILE, document)


def read_statistics(folder: Path) -> Statistics:
    """Read and check what a folder of statistics says of itself.

    Raises MoeboundError for a folder that is none or is unfinished, FormatError for one that says
    something else than statistics do.
    """
    folder = Path(folder)
    path = folder / FILE
    if not folder.is_dir():
        raise MoeboundError(
            f"{folder}: no such folder; expected one that `moebound calibrate` wrote"
        )
    if not path.is_file():
        unfinished = any(folder.glob("layer-*.safetensors"))
        raise MoeboundError(
            f"{path}: not found; "
            + ("the same `moebound calibrate` command finishes it" if unfinished
               else "expected what `moebound calibrate` writes")
        )  # fmt: skip
    document = FORMAT.read(path).content
    with fields_of(str(path)):
        moments, routed = document["moments"], document["routed"]
        if moments not in ("full", "diagonal") or not isinstance(routed, bool):
            raise FormatError(f"moments {moments!r}, routed {routed!r}")
        of = Of(
            model=str(document["model"]),
            fingerprint=str(document["fingerprint"]),
            text=str(document["text"]),
            text_sha256=str(document["text_sha256"]),
            n_sequences=count(document["n_sequences"], "n_sequences"),
            n_tokens=count(document["n_tokens"], "n_tokens"),
            routed=routed,
            moments=moments,
            width=count(document["width"], "width", most=_MOST),
            inner=count(document["inner"], "inner", most=_MOST),
        )
        parts = tuple(
            Part(
                layer=count(entry["layer"], "layer", most=_MOST),
                first=count(entry["first"], "first", most=_MOST),
                n_experts=count(entry["n_experts"], "n_experts", most=_MOST),
                file=_name(entry["file"]),
            )
            for entry in items(document["parts"], "parts")
        )
    for part in parts:
        if not (folder / part.file).is_file():
            raise FormatError(f"{folder / part.file}: missing; {FILE} names it")
    return Statistics(folder, of, parts)


def _name(value: Any) -> str:
    """A file of the folder. A name that leads elsewhere is refused."""
    if not isinstance(value, str) or Path(value).name != value:
        raise FormatError(f"file {value!r}: expected the name of a file in the same folder")
    return value
