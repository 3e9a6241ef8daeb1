"""MoDeGPT's part for MLPs (Lin et al., 2408.09632): fewer hidden channels, and a down projection
that makes up for it: `modegpt_re:b12`.

Nyström, of the second moments C = Σ g² z zᵀ of an expert's hidden values z = silu(G x) · U x
(algorithm 1 of the paper, which has no g):

    J     the p' channels of the largest ridge leverage, diag C (C + λ I)⁻¹, λ = 1 % of C's mean
    kept  G and U of J, and D C_:J (C_JJ + λ I)⁻¹ in the place of D

Stored: which channels (a bit each, in each matrix), and what is kept in the checkpoint's dtype, or
in N-bit entropy-coded whole numbers (`qN`). Other channels decode to 0.

`modegpt_re:k0.75+calibrated` has what is kept coded by any method that looks at one expert: the
rows of G and U by the inputs' moments, the new down projection by C_JJ, which is what it gets (J's
hidden values do not depend on what else was cut). That is the whole of the error that is left to
choose: with D_J the new projection, Σ |D z - D' z_J|² is the cut's own error and
tr((D_J - D') C_JJ (D_J - D')ᵀ), for the cut's is orthogonal to z_J (up to λ). A bound holds for
every kept weight of G and U, against the checkpoint's, and for every weight of the new down
projection, against what that was made; ε is that of the whole expert as it was. Of weights that
were cut nothing is promised, so each certificate says "none".

Deviations: C is shrunk
towards the layer's, so that experts with few tokens have one; all experts keep the same share
(`kN`, or what bytes allow), where the paper has a share for each layer by how much it changes its
input. Its parts for attention are for attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch

from moebound.checkpoint import Role
from moebound.codec import stats
from moebound.codec.arrays import dtype_name
from moebound.codec.fields import FieldReader
from moebound.errors import CorruptionError, MethodError
from moebound.methods.artifact import compress
from moebound.methods.base import Encoding, ExpertView, GroupView, MatrixSpec, Method, Payload
from moebound.methods.bases.approximation import (
    BITS,
    Approximation,
    Option,
    SecondMoments,
    places,
    ranks,
)
from moebound.methods.bases.exact import take_dense, write_dense
from moebound.methods.bases.shared import from_neurons, neurons
from moebound.methods.bounded import reference
from moebound.methods.reading import Stored
from moebound.methods.registry import get_method
from moebound.types import NUMPY_DTYPES, Array, ErrorBound, ExpertKey

_RIDGE = 0.01
_TRIES = 6
_HEAD = 4
_CODED = 8
"""Of a payload's first byte: rows by another method."""


@dataclass(frozen=True)
class ModeGpt(Approximation):
    """A payload: which neurons, and their rows. inner: the setting of what codes these; none where
    it is empty."""

    id: ClassVar[str] = "modegpt_re"
    statistics: ClassVar[frozenset[str]] = frozenset({"hidden", "tokens"})
    options: ClassVar[Mapping[str, Option]] = {
        "b": BITS, "k": Option("keep", 0, 1, "the share of hidden channels that is kept"),
        "q": Option("coded", 2, 16, "bits of a weight that is kept, 2 to 8 or 16"),
    }  # fmt: skip
    sized_by: ClassVar[tuple[str, ...]] = ("b", "k")
    keeps: ClassVar[bool] = True
    keep: float = -1.0
    coded: int = 16
    inner: str = ""

    @classmethod
    def from_options(cls, options: str) -> Self:
        own, plus, inner = options.partition("+")
        found = super().from_options(own)
        if not plus:
            return found
        coder = get_method(inner)
        if coder.scope != "expert" or coder.edits_router:
            raise MethodError(
                f"method '{cls.id}:{options}': {coder.setting} looks at a whole layer; expected "
                "one that codes each expert for itself, as calibrated or rtn:int4:g64"
            )
        if found.bits or found.coded != cls.coded:
            raise MethodError(
                f"method '{cls.id}:{options}': {coder.setting} says how many bits a weight has; "
                f"expected a share that is kept and no more, as in {cls.id}:k0.75+{coder.setting}"
            )
        return replace(found, inner=coder.setting)

    @property
    def setting(self) -> str:
        return super().setting + (f"+{self.inner}" if self.inner else "")

    @cached_property
    def _coder(self) -> Method | None:
        return get_method(self.inner) if self.inner else None

    @property
    def coder(self) -> Method | None:
        return self._coder

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        own = super().wanted_statistics(shared=shared)
        return own if shared or self.coder is None else own | self.coder.wanted_statistics()

    def _encode(self, group: GroupView) -> Encoding:
        moments = SecondMoments(group)
        leverage: dict[ExpertKey, Array] = {}
        for expert in group.experts:  # one C at a time: those of a layer may not fit
            c = moments.of(expert.key, "down")
            if c is None:
                raise MethodError(
                    f"{group.experts[0].key}: no statistics of its hidden values; choose routed "
                    "experts only"
                )
            leverage[expert.key] = _leverage(c)
        rows = {(e.key, role): neurons(e, role)[0].shape for e, role in places(group)}
        if not self.bits:
            least = 1 if self.inner else 0  # methods code no empty matrix
            kept = [max(least, round(self.keep * len(leverage[e.key]))) for e in group.experts]
            return self._at(group, moments, leverage, kept)
        per = [
            sum(rows[e.key, role][1] for role in e.matrices)
            * (self._width(e) if self.coded == 16 else self.coded / 8)
            for e in group.experts
        ]
        fixed = sum(-(-shape[0] // 8) + _HEAD for shape in rows.values())
        room = self.room(group)
        self.refuse_small(group, room, fixed, "frames alone take more")
        caps = [len(leverage[e.key]) for e in group.experts]
        # What is entropy-coded has the bytes that it has: a few are made, and the best is kept.
        factor = 1.0
        tried: list[tuple[float, Encoding]] = []
        for _ in range(1 if self.coded == 16 else _TRIES):
            costs = [cost * factor for cost in per]
            kept = ranks([1.0] * len(costs), caps, costs, room - fixed)
            made = self._at(group, moments, leverage, kept)
            size = _payload_bytes(made)
            tried.append((abs(size - room), made))
            if kept == caps:
                self.refuse_large(group, room - size, max(costs))
            if tried[-1][0] <= 0.003 * room or kept == caps:
                break
            factor *= max(0.1, (size - fixed) / max(1.0, float(np.dot(kept, costs))))
        return min(tried, key=lambda one: one[0])[1]

    @staticmethod
    def _width(expert: ExpertView) -> int:
        return NUMPY_DTYPES[dtype_name(next(iter(expert.matrices.values())).dtype)].itemsize

    def _at(
        self,
        group: GroupView,
        moments: SecondMoments,
        leverage: Mapping[ExpertKey, Array],
        kept: Sequence[int],
    ) -> Encoding:
        matrices: dict[ExpertKey, dict[Role, Payload]] = {e.key: {} for e in group.experts}
        for expert, n_kept in zip(group.experts, kept, strict=True):
            order = np.argsort(-leverage[expert.key], kind="stable")[:n_kept]
            own = np.sort(order)
            mask = np.zeros(len(leverage[expert.key]), np.uint8)
            mask[own] = 1
            packed = np.packbits(mask, bitorder="little").tobytes()
            some = {role: _some(expert, role, moments, own) for role in expert.matrices}
            if self.coder is not None:
                coded = self._coded(self.coder, expert, group, some, own)
                for role, data in coded.items():
                    head = bytes([some[role][1] | _CODED])
                    matrices[expert.key][role] = Payload(head + packed + data)
                continue
            for role, (rows, how) in some.items():
                dtype = dtype_name(expert.matrices[role].dtype)
                dense = write_dense(rows.astype(np.float32), self.coded, dtype)
                matrices[expert.key][role] = Payload(bytes([how]) + packed + dense)
        return Encoding(matrices)

    @staticmethod
    def _coded(
        coder: Method,
        expert: ExpertView,
        group: GroupView,
        some: Mapping[Role, tuple[Array, int]],
        own: Array,
    ) -> dict[Role, bytes]:
        """What the coder makes of an expert of the kept channels alone, `own`."""
        arrays = {
            role: np.ascontiguousarray(_unfolded(rows, how).astype(expert.matrices[role].dtype))
            for role, (rows, how) in some.items()
        }
        statistics = {
            name: _Kept(of, own) if name in _HIDDEN else of
            for name, of in group.coded_by(coder.wanted_statistics()).items()
        }
        # A neuron is a row of each; of down that is an input.
        view = ExpertView(expert.key, arrays, _absolute(expert), frozenset({"down"}))
        made = compress(coder, GroupView((view,), statistics))
        return {role: matrix.data for role, matrix in made.experts[expert.key].items()}

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        read = FieldReader(payload, 0)
        how = read.take(1)[0]
        coded, how = how & _CODED, how & ~_CODED
        turned, fold = how & 1, how >> 1
        if len(spec.shape) != 2 or how > 5:
            raise CorruptionError(f"neurons of {how} for shape {spec.shape}")
        n, width = spec.shape[::-1] if turned else spec.shape
        if fold:
            n, width = n // 2, width * 2
        mask = np.frombuffer(read.take((n + 7) // 8), np.uint8)
        at = np.flatnonzero(np.unpackbits(mask, count=n, bitorder="little"))
        found = np.zeros((n, width), np.float32)
        if coded:
            found[at] = _take_coded(read, (len(at), width), fold, spec)
        else:
            found[at] = take_dense(read, (len(at), width))
        return from_neurons(found, how, spec.shape)


_HIDDEN = frozenset({"hidden", "hidden_diagonal"})
"""Statistics that have a number, or a row and a column, for each hidden channel."""


@dataclass(frozen=True, eq=False)
class _Kept(Mapping[ExpertKey, Array]):
    """Statistics of hidden values, of some of them. Each is made when it is asked for."""

    of: Mapping[ExpertKey, Array]
    own: Array

    def __getitem__(self, key: ExpertKey) -> Array:
        found = self.of[key]
        return found[np.ix_(*[self.own] * found.ndim)]

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


def _some(expert: ExpertView, role: Role, moments: SecondMoments, own: Array) -> tuple[Array, int]:
    """Rows of the kept neurons, of down as they make up for the others; and h of `neurons`."""
    rows, how = neurons(expert, role)
    c = moments.of(expert.key, role) if role == "down" else None
    return (rows[own] if c is None else _made_up(rows, c, own)), how


def _unfolded(rows: Array, how: int) -> Array:
    """Rows of neurons, of gate and up in one as all of gate, then all of up."""
    return np.concatenate(np.split(rows, 2, axis=1)) if how >> 1 else rows


def _take_coded(read: FieldReader, shape: tuple[int, int], fold: int, spec: MatrixSpec) -> Array:
    """Rows of neurons, of what a coder wrote of `_unfolded` ones. Raises CorruptionError."""
    n, width = shape
    stored = Stored.of(read.take(read.left))
    found = stored.spec
    expected = (2 * n, width // 2) if fold else shape
    if found.dtype != spec.dtype or stored.needs or found.shape != expected:
        raise CorruptionError(f"rows of shape {found.shape} as {found.dtype}, expected {expected}")
    rows = stored.decode(threads=1, max_bytes=found.n_bytes)
    if fold:
        rows = np.concatenate(np.split(rows, 2), axis=1)
    return rows.astype(np.float32)


def _absolute(expert: ExpertView) -> Mapping[Role, ErrorBound] | None:
    """Its bounds in weight units, so that they are those of the whole expert; None without."""
    bounds = expert.bounds
    if bounds is None:
        return None
    whole = reference(expert.matrices, bounds)
    found: dict[Role, ErrorBound] = {}
    for role, array in expert.matrices.items():
        bound = bounds[role]
        own = whole if whole is not None and bound.scope == "expert" else stats(array)
        epsilon = bound.absolute(own) if bound.pointwise else 0.0
        found[role] = ErrorBound(epsilon) if epsilon > 0 else bound
    return found


def _payload_bytes(made: Encoding) -> int:
    return sum(len(p.data) for roles in made.matrices.values() for p in roles.values())


def _leverage(c: Array) -> Array:
    """diag C (C + λ I)⁻¹ = 1 - λ diag (C + λ I)⁻¹; the mean of C's diagonal is 1."""
    h = torch.from_numpy(c)
    inverse = torch.linalg.inv(h + _RIDGE * torch.eye(len(h), dtype=h.dtype))
    found: Array = 1 - _RIDGE * inverse.diagonal().numpy()
    return found


def _made_up(rows: Array, c: Array, kept: Array) -> Array:
    """rows: of down turned, [p, d] -> [p', d]: (C_JJ + λ I)⁻¹ C_J: Dᵀ."""
    h = torch.from_numpy(c)
    j = torch.from_numpy(kept)
    own = h[j][:, j] + 1e-6 * torch.eye(len(j), dtype=h.dtype)
    found: Array = torch.linalg.solve(own, h[j] @ torch.from_numpy(np.ascontiguousarray(rows)))
    return np.asarray(found)
