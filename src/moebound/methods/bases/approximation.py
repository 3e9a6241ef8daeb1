"""What methods of this folder have in common: options, sizes, and what they ask of a group.

A setting is an id and options behind colons, each a name and a number: ``svd:r64``, ``svd:b3:f8``.
``bN`` means N bits a weight, everything that is stored for the group counted, frames included: what
a rank costs is known beforehand, so sizes are met to within one rank of one matrix.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from moebound.checkpoint import Role
from moebound.codec.arrays import dtype_name
from moebound.errors import MethodError, SizeError
from moebound.methods.base import Encoding, ExpertView, GroupView, Method, Scope, SharedPayload
from moebound.methods.bases.exact import WIDTHS, dense_part
from moebound.methods.blob import MatrixBlob, SharedBlob, Use
from moebound.methods.one_thread import one_thread
from moebound.types import Array, ExpertKey

_TOKEN = re.compile(r"([a-z]+)(\d{1,9}(?:\.\d{1,6})?)?")
_EMPTY = memoryview(b"")
DAMPING = 0.01
SHRINK = 0.25
"""Of the number of input channels: so many tokens of the layer's mean count in an expert's second
moments, so that experts with few tokens, or none, are not judged by them alone."""


class Option(NamedTuple):
    """field: which it sets. least, most: of its number; both None for one without a number."""

    field: str
    least: float | None = None
    most: float | None = None
    means: str = ""


BITS = Option("bits", 0.01, 64, "bits a weight, all counted")
RANK = Option("rank", 0, 1 << 20, "the rank of every matrix")
FACTORS = Option("factors", 2, 16, "bits of a number of a factor, 2 to 8 or 16")


@dataclass(frozen=True)
class Approximation(Method):
    """options: by name. sized_by: names of which one has to be given.

    bits: a weight, everything counted; 0 where another option says the size. factors: bits of a
    stored number.
    """

    scope: ClassVar[Scope] = "layer"
    options: ClassVar[Mapping[str, Option]] = {"b": BITS, "f": FACTORS}
    sized_by: ClassVar[tuple[str, ...]] = ("b",)
    bits: float = 0.0
    factors: int = 16

    @classmethod
    def from_options(cls, options: str) -> Self:
        given: dict[str, Any] = {}
        kinds = {field.name: type(getattr(cls, field.name)) for field in fields(cls)}
        for token in options.split(":") if options else []:
            found = _TOKEN.fullmatch(token)
            option = cls.options.get(found[1]) if found else None
            if found is None or option is None or option.field in given:
                raise cls._refused(options)
            if option.least is None or option.most is None:
                if found[2] is not None:
                    raise cls._refused(options)
                given[option.field] = True
                continue
            kind = kinds[option.field]
            number = float(found[2] or "nan")
            whole = kind is int and (not number.is_integer())
            if not option.least <= number <= option.most or whole:
                raise cls._refused(options)
            given[option.field] = kind(number)
        if given.get("factors", 16) not in WIDTHS:
            raise cls._refused(options)
        sizes = [name for name in cls.sized_by if cls.options[name].field in given]
        if len(sizes) != 1:
            raise cls._refused(options)
        return cls(**given)

    @classmethod
    def _refused(cls, options: str) -> MethodError:
        known = "; ".join(
            f"{name}{'' if o.least is None else 'N'}: {o.means}" for name, o in cls.options.items()
        )
        sizes = " or ".join(f"{name}N" for name in cls.sized_by)
        return MethodError(
            f"method '{cls.id}:{options}': expected one of {sizes}, and what else is wanted, as in "
            f"{cls.id}:{cls.sized_by[0]}3. Options are {known}"
        )

    @property
    def setting(self) -> str:
        parts = [self.id]
        defaults = {field.name: field.default for field in fields(self)}
        for name, option in self.options.items():
            value = getattr(self, option.field)
            if option.field in defaults and value == defaults[option.field]:
                continue
            parts.append(name if option.least is None else f"{name}{value:.10g}")
        return ":".join(parts)

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """A matrix of rank 0 is a few bytes, whatever its shape."""
        return 1 << 40

    def wanted_statistics(self, *, shared: bool = False) -> frozenset[str]:
        """Of shared experts there are none: they are taken as they are."""
        return frozenset() if shared else self.statistics

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        with one_thread():
            return self._encode(group)

    @abstractmethod
    def _encode(self, group: GroupView) -> Encoding:
        """As `encode`, while torch computes with one thread."""

    # What a number of bits leaves room for

    def room(self, group: GroupView, *, uses: int = 0, parts: int = 0) -> float:
        """Bytes that `bits` a weight leave for payloads, the frames counted off."""
        shapes = [m.shape for expert in group.experts for m in expert.matrices.values()]
        total = self.bits * n_weights(group) / 8
        frames = sum(_frame(self.id, shape, uses) for shape in shapes)
        for part in range(parts):
            frames += len(SharedBlob(self.id, 1, 0, part, n_weights(group), _EMPTY).build()) + 3
        return total - frames

    def refuse_small(self, group: GroupView, room: float, fixed: float, what: str) -> None:
        """Raises SizeError, naming the least it can, where `fixed` bytes do not fit into room."""
        if room < fixed:
            least = self.bits + 8 * (fixed - room) / n_weights(group)
            least = float(np.ceil(least * 1000) / 1000)
            raise SizeError(
                f"{self.bits:g} bits a weight of layer {group.layer}: {what}; the least is "
                f"{least:g} bits",
                least,
            )

    def refuse_large(self, group: GroupView, left: float, unit: float) -> None:
        """Raises SizeError, naming the most it can, where more than a unit of bytes is left."""
        if left > unit:
            most = self.bits - 8 * left / n_weights(group)
            raise SizeError(
                f"{self.bits:g} bits a weight of layer {group.layer}: at full rank it takes "
                f"{most:.4g} bits, and that is the most",
                most,
            )


def _frame(name: str, shape: tuple[int, ...], uses: int) -> int:
    """Of a matrix whose payload has a byte a weight at most."""
    used = tuple(Use(part, 0) for part in range(uses))
    length = max(1, -(-math.prod(shape).bit_length() // 7))
    return len(MatrixBlob(name, 1, shape, "BF16", 0, used, _EMPTY).build()) - 1 + length


def n_weights(group: GroupView) -> int:
    return sum(m.size for expert in group.experts for m in expert.matrices.values())


def ranks(
    scores: Sequence[float], caps: Sequence[int], costs: Sequence[float], budget: float
) -> list[int]:
    """Ranks in proportion to scores, none above its cap, that cost at most the budget.

    costs: of one more rank of each. What rounding down leaves goes to the largest remainders; what
    a cap leaves goes to the others. So less is left than the dearest unit, unless all are capped.
    """
    s, cap, cost = (np.asarray(values, np.float64) for values in (scores, caps, costs))
    s = np.where(s > 0, s, 1e-12 * max(float(s.max(initial=0.0)), 1e-300))
    free, exact = cap > 0, np.zeros(len(s))
    left = max(0.0, budget)
    while free.any():
        share = left * s[free] / float((s[free] * cost[free]).sum())
        full = share >= cap[free]
        if not full.any():
            exact[free] = share
            break
        at = np.flatnonzero(free)[full]
        exact[at] = cap[at]
        left -= float((cap[at] * cost[at]).sum())
        free[at] = False
    found = np.floor(exact + 1e-9)
    slack = budget - float((found * cost).sum())
    while True:
        possible = np.flatnonzero((found < cap) & (cost <= slack))
        if not len(possible):
            return [int(rank) for rank in found]
        at = possible[np.argmax((exact - found)[possible])]
        found[at] += 1
        slack -= cost[at]


# Weights as a method sees them


def is_transposed(expert: ExpertView, role: Role, n_inputs: int | None = None) -> bool:
    """Whether a matrix is [in, out]. n_inputs: known from elsewhere; settles what only the shape
    tells."""
    rows, cols = expert.matrices[role].shape
    by_shape = n_inputs is not None and cols != n_inputs and rows == n_inputs
    return role in expert.transposed or by_shape


def weights(expert: ExpertView, role: Role, *, n_inputs: int | None = None) -> Array:
    """[out, in] float64. Raises MethodError for weights that are not finite."""
    found: Array = expert.matrices[role].astype(np.float64)
    if not np.isfinite(found).all():
        raise MethodError(f"{expert.key}, {role}: a weight is not finite")
    return found.T if is_transposed(expert, role, n_inputs) else found


def as_stored(expert: ExpertView, role: Role) -> Array:
    """[rows, cols] float64, as the checkpoint has it. Raises as `weights`."""
    found: Array = expert.matrices[role].astype(np.float64)
    if not np.isfinite(found).all():
        raise MethodError(f"{expert.key}, {role}: a weight is not finite")
    return found


def places(group: GroupView) -> Iterator[tuple[ExpertView, Role]]:
    """Every matrix, expert by expert."""
    for expert in group.experts:
        for role in expert.matrices:
            yield expert, role


def roles_of(group: GroupView) -> list[Role]:
    return list(group.experts[0].matrices)


def one_shape(group: GroupView, role: Role) -> tuple[int, int]:
    """[rows, cols] of all experts. Raises MethodError where they differ."""
    shapes = {expert.matrices[role].shape for expert in group.experts}
    if len(shapes) > 1:
        raise MethodError(
            f"layer {group.layer}, {role}: experts of different sizes {sorted(shapes)}; a method "
            "whose experts share a part takes one size"
        )
    rows, cols = shapes.pop()
    return rows, cols


def mean_part(
    group: GroupView, role: Role, count: Mapping[ExpertKey, float], bits: int
) -> SharedPayload:
    """The mean of a projection's matrices, as they are stored, weighted by `count`."""
    mean = np.zeros(one_shape(group, role))
    for expert in group.experts:
        mean += as_stored(expert, role) * (count[expert.key] / sum(count.values()))
    return dense_part(mean, bits, dtype_name(group.experts[0].matrices[role].dtype))


# Statistics


def tokens(group: GroupView) -> dict[ExpertKey, float]:
    """How many tokens each expert was sent; 1 of all where nobody counted, or none was sent any."""
    count = group.statistics.get("tokens", {})
    found = {e.key: float(np.sum(count.get(e.key, 0))) for e in group.experts}
    return found if any(found.values()) else dict.fromkeys(found, 1.0)


class SecondMoments:
    """H of each expert, shrunk towards that of its layer: (H_e + t H) with H_e the sum over its
    tokens, H the layer's mean, t = in / 4. None where there are no statistics."""

    def __init__(self, group: GroupView) -> None:
        self._group, self._tokens = group, tokens(group)
        self._layer: dict[str, Array] = {}

    @staticmethod
    def _side(role: Role) -> str:
        return "hidden" if role == "down" else "inputs"

    def n_inputs(self, role: Role) -> int | None:
        found = self._group.statistics.get(self._side(role))
        return None if found is None else len(found[self._group.experts[0].key])

    def of(self, key: ExpertKey, role: Role) -> Array | None:
        """[in, in] float64, positive definite: the mean of its diagonal is 1, damped by 1 % of
        it."""
        mixed = self.total(key, role)
        if mixed is None:
            return None
        mean = float(mixed.diagonal().mean())
        if not mean > 0:
            return np.eye(len(mixed))
        found: Array = mixed / mean
        found[np.diag_indices(len(found))] += DAMPING
        return found

    def total(self, key: ExpertKey, role: Role) -> Array | None:
        """[in, in] float64, as it is summed up."""
        side = self._side(role)
        if side not in self._group.statistics:
            return None
        if side not in self._layer:
            total = sum(_full(self._group.statistics[side][e.key]) for e in self._group.experts)
            self._layer[side] = np.asarray(total) / sum(self._tokens.values())
        own, layer = _full(self._group.statistics[side][key]), self._layer[side]
        found: Array = own + SHRINK * len(own) * layer
        return found


def _full(moments: Array) -> Array:
    found: Array = np.diag(moments) if moments.ndim == 1 else moments
    return found.astype(np.float64)
