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

and, of version 2 on, of a layer of L experts,

    sent        [E] int64, tokens that the router sent to each expert; so they are of `norms`, too,
                where experts saw all tokens (`routed` is false)
    sent_gates  [E] float64, sum over these of g
    norms       [E] float64, sum over these of g |f(x)|
    plain       [E, 2, N] float64, sum of f(x) and of its square, without g, over what it saw
    ratios      [E, 256] int64, of the tokens whose largest weight is this expert's: how many have a
                second one of so many 256ths of it
    logits      [E, L] float64, sum over all tokens of the router's logits of this expert, times
                those of each; not there where a router gives none
    inputs_affinity, hidden_affinity    as `inputs` and `hidden`, with g in the place of g²; not
                there unless asked for (`calibrate --affinity`)
    kept        [E, L] uint8, 1 for the experts in the set of (row + 1) that changes the layer's
                output least (`calibrate --search`); not there unless asked for

and, of version 3, where `fisher` is true (`calibrate/fisher.py`): `inputs` and `hidden` are sums of
s x xᵀ in the place of g² x xᵀ, s being the squares of the loss's gradients at what gate and up give
(what down gives), summed over their channels; and

    gate_rows   [E, M] float64, of these squares the sum by channel of gate; missing in families
                without a gate
    up_rows     [E, M] float64, of up
    down_rows   [E, N] float64, of down

Sums, not means: those of two texts can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import safetensors
from safetensors.numpy import save as to_safetensors

from moebound.errors import FormatError, MoeboundError
from moebound.files.documents import Format, count, fields_of, items, number, save_json
from moebound.files.durable import save_bytes
from moebound.types import Array, ExpertKey

FORMAT = Format("moebound.statistics", 3)
_WITHOUT_FISHER = 2
"""The version that is written where nothing of version 3 is."""
FILE = "statistics.json"
Moments = Literal["full", "diagonal"]
Side = Literal["inputs", "hidden"]
"""Whose second moments: of what gate and up get, or of what down gets."""
SecondMoments = Literal["inputs", "hidden", "inputs_affinity", "hidden_affinity"]
"""By the names of their arrays."""

FEW_TOKENS = 128
"""Experts that saw fewer are counted: their H alone says little."""
RATIOS = 256
"""Steps in which the ratio of two weights is counted."""

_MOST = 1 << 24
_BLOCK = 256


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
    sent: Array
    sent_gates: Array
    norms: Array
    plain: Array
    ratios: Array
    logits: Array | None = None
    kept: Array | None = None
    inputs_affinity: Array | None = None
    hidden_affinity: Array | None = None
    gate_rows: Array | None = None
    up_rows: Array | None = None
    down_rows: Array | None = None

    def save(self, folder: Path) -> None:
        """Raises StoreError if the disk refuses."""
        found = {name: getattr(self, name) for name in _SPELLED}
        arrays = {n: np.ascontiguousarray(array) for n, array in found.items() if array is not None}
        save_bytes(folder / self.part.file, to_safetensors(arrays))


@dataclass(frozen=True)
class Of:
    """What statistics are of. fingerprint: of its experts (`checkpoint.corners`).
    text: a task's or file's name. text_sha256: of the token ids. routed: whether experts saw the
    tokens that were sent to them, or all of them. width: N; inner: M. searched: whether there is
    `kept`. after: the method whose router edits the model had meanwhile. affinity: whether there
    are `inputs_affinity` and `hidden_affinity`. fisher: whether tokens are weighted by what the
    loss feels of them. answer_weight: how many times an answer's tokens count in that."""

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
    searched: bool = False
    after: str | None = None
    affinity: bool = False
    fisher: bool = False
    answer_weight: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Without what version 1 had not, where it says nothing."""
        later = {"searched", "after", "affinity", "fisher"}
        said = {name: value for name, value in vars(self).items() if value or name not in later}
        if self.answer_weight == 1:
            del said["answer_weight"]
        return said

    @classmethod
    def from_json(cls, data: Any) -> Of:
        """Raises FormatError, and what reading JSON of another form raises (`fields_of`)."""
        moments, routed = data["moments"], data["routed"]
        if moments not in ("full", "diagonal") or not isinstance(routed, bool):
            raise FormatError(f"moments {moments!r}, routed {routed!r}")
        return cls(
            model=str(data["model"]),
            fingerprint=str(data["fingerprint"]),
            text=str(data["text"]),
            text_sha256=str(data["text_sha256"]),
            n_sequences=count(data["n_sequences"], "n_sequences"),
            n_tokens=count(data["n_tokens"], "n_tokens"),
            routed=routed,
            moments=moments,
            width=count(data["width"], "width", most=_MOST),
            inner=count(data["inner"], "inner", most=_MOST),
            searched=data.get("searched", False) is True,
            after=None if data.get("after") is None else str(data["after"]),
            affinity=data.get("affinity", False) is True,
            fisher=data.get("fisher", False) is True,
            answer_weight=number(data.get("answer_weight", 1), "answer_weight"),
        )


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

    def tokens_of(self, key: ExpertKey) -> int:
        """How many tokens one expert saw."""
        part = self._part(key)
        return int(self._read(part, "tokens")[key.expert - part.first])

    def moments(self, key: ExpertKey, side: SecondMoments) -> Array:
        """H of one expert, float64: [N, N], or [N] where only the diagonal was kept."""
        return self.whole(self.packed(key, side), side)

    def packed(self, key: ExpertKey, side: SecondMoments) -> Array:
        """The same as it is on disk, float64: the upper triangle row by row, or the diagonal."""
        part = self._part(key)
        return self._read(part, side, key.expert - part.first).astype(np.float64)

    def whole(self, packed: Array, side: SecondMoments) -> Array:
        """[N, N] of what `packed` gives; a diagonal as it is."""
        if self.of.moments == "diagonal":
            return packed
        n = self.of.width if side.startswith("inputs") else self.of.inner
        found, at = np.empty((n, n)), 0
        for row in range(n):
            found[row, row:] = packed[at : at + n - row]
            at += n - row
        for start in range(0, n, _BLOCK):  # mirrored, block by block: columns are slow to write
            stop = min(start + _BLOCK, n)
            found[stop:, start:stop] = found[start:stop, stop:].T
            own = found[start:stop, start:stop]
            own[...] = np.triu(own) + np.triu(own, 1).T
        return found

    def outputs(self, key: ExpertKey) -> Array:
        """[2, N] float64: sum of g f(x), and of its square."""
        return self.array(key, "outputs")

    def array(self, key: ExpertKey, name: str) -> Array:
        """One expert's row of an array, float64; of second moments the `moments`, or of
        `inputs_diagonal` and `hidden_diagonal` what stands on these.

        Raises MoeboundError, naming the array, for statistics that lack it.
        """
        side = name.removesuffix("_diagonal")
        if side in get_args(SecondMoments):
            found = self.moments(key, cast(SecondMoments, side))
            return found.diagonal().copy() if side != name and found.ndim == 2 else found
        part = self._part(key)
        return np.asarray(self._read(part, name, key.expert - part.first), np.float64)

    def gates(self, key: ExpertKey) -> float:
        part = self._part(key)
        return float(self._read(part, "gates")[key.expert - part.first])

    def median_ratios(self) -> dict[int, float]:
        """By layer: the median of a token's second largest weight over its largest; 0 of a layer
        that no token reached. Raises as `array`."""
        sums: dict[int, Array] = {}
        for part in self.parts:
            found = self._read(part, "ratios").sum(axis=0)
            sums[part.layer] = sums.get(part.layer, 0) + found
        medians = {}
        for layer, counts in sums.items():
            half, below = counts.sum() / 2, np.cumsum(counts)
            step = int(np.searchsorted(below, half))
            inside = (half - (below[step] - counts[step])) / counts[step] if counts.any() else 0.0
            medians[layer] = float((step + inside) / RATIOS) if counts.any() else 0.0
        return medians

    def check_model(self, fingerprint: str, model: str) -> None:
        """Raises MoeboundError unless they are of this model."""
        if fingerprint != self.of.fingerprint:
            raise MoeboundError(
                f"{self.folder}: statistics of {self.of.model}, and {model} has other weights; "
                "make them anew with `moebound calibrate`, in float32 or the checkpoint's dtype"
            )

    def check_fisher(self) -> None:
        """Raises MoeboundError unless they are weighted by what the loss feels."""
        if not self.of.fisher:
            raise MoeboundError(
                f"{self.folder}: not weighted by what the loss feels; make statistics with "
                "`moebound calibrate --fisher`"
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
                if name in _LATER and name not in file.keys():  # noqa: SIM118  # no mapping
                    raise MoeboundError(f"{path}: has no {name!r}; {_LATER[name]}")
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
        if name in ("tokens", "gates") and (found < 0).any():
            raise FormatError(f"{path}, {name}: has values below 0")
        return found

    def _shape(self, part: Part, name: str) -> tuple[int, ...]:
        e, n, m = part.n_experts, self.of.width, self.of.inner
        full = self.of.moments == "full"
        return {
            "tokens": (e,),
            "gates": (e,),
            **dict.fromkeys(("inputs", "inputs_affinity"), (e, packed_size(n) if full else n)),
            **dict.fromkeys(("hidden", "hidden_affinity"), (e, packed_size(m) if full else m)),
            "outputs": (e, 2, n),
            "sent": (e,),
            "sent_gates": (e,),
            "norms": (e,),
            "plain": (e, 2, n),
            "ratios": (e, RATIOS),
            "logits": (e, self._n_experts(part.layer)),
            "kept": (e, self._n_experts(part.layer)),
            "gate_rows": (e, m),
            "up_rows": (e, m),
            "down_rows": (e, n),
        }[name]

    def _n_experts(self, layer: int) -> int:
        return sum(part.n_experts for part in self.parts if part.layer == layer)


_SPELLED = {
    "tokens": "I64", "gates": "F64", "inputs": "F32", "hidden": "F32", "outputs": "F32",
    "sent": "I64", "sent_gates": "F64", "norms": "F64", "plain": "F64",
    "ratios": "I64", "logits": "F64", "kept": "U8",
    "inputs_affinity": "F32", "hidden_affinity": "F32",
    "gate_rows": "F64", "up_rows": "F64", "down_rows": "F64",
}  # fmt: skip

_ANEW = "these statistics are of an earlier moebound; make them anew with `moebound calibrate`"
_MAKE = "make them with `moebound calibrate --"
_LATER = {
    **dict.fromkeys(("sent", "sent_gates", "norms", "plain", "ratios"), _ANEW),
    "logits": f"its router gives no logits, or {_ANEW}",
    "kept": f"{_MAKE}search`",
    **dict.fromkeys(("inputs_affinity", "hidden_affinity"), f"{_MAKE}affinity`"),
    **dict.fromkeys(("gate_rows", "up_rows", "down_rows"), f"{_MAKE}fisher`"),
}
"""What a folder may lack, and what is said then."""


def packed_size(n: int) -> int:
    """Numbers of the upper triangle of an n x n matrix."""
    return n * (n + 1) // 2


def save_statistics(folder: Path, of: Of, parts: Sequence[Part]) -> None:
    """Write what makes a folder of finished parts whole."""
    version = {} if of.fisher else {"version": _WITHOUT_FISHER}
    document = (
        FORMAT.header | version | of.to_json() | {"parts": [dict(vars(part)) for part in parts]}
    )
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
        of = Of.from_json(document)
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
