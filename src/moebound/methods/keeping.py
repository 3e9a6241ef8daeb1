"""What pruning and merging have in common: some experts are kept, and coded by any method.

A setting is `reap_re:keep6`, `reap_re:keep75%` or, with another method for what is kept,
`reap_re:keep6+rtn:int4:g64`. Without one it is `bounded:raw`, the weights as they are. The count is
of each layer's routed experts; shared experts are all kept, and coded.

Of an expert that is not kept a store has an empty payload (the frame alone, 25 to 40 bytes a
matrix): what is computed in its place is in the layer's router edit. Nothing is promised of its
weights, and its certificates say so: guarantee "none", with the error of what it decodes to, zeros
or another expert's weights.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from moebound.errors import CorruptionError, MethodError
from moebound.methods.artifact import compress
from moebound.methods.base import (
    Encoding,
    ExpertView,
    GroupView,
    MatrixSpec,
    Method,
    Payload,
    Routing,
)
from moebound.methods.registry import BOUNDED, get_method
from moebound.methods.router_edit import RouterEdit
from moebound.types import Array, ExpertKey

RAW = f"{BOUNDED}:raw"
_KEEP = re.compile(r"keep([1-9][0-9]{0,5})(%?)")
_MOST_WEIGHTS = 1 << 28
"""Of a matrix without bytes: more than any known expert's, and no more memory than half a GiB."""


@dataclass(frozen=True)
class Keeping(Method):
    """keep: how many experts of a layer, or percent of them. flags: further options of a method,
    in the order given. inner: the setting of what codes the kept ones."""

    scope = "layer"
    edits_router: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    known: ClassVar[str] = ""
    """A regular expression of one further option; none where it is empty."""

    keep: str = "50%"
    flags: tuple[str, ...] = ()
    inner: str = RAW

    @classmethod
    def from_options(cls, options: str) -> Self:
        own, _, inner = options.partition("+")
        first, *flags = own.split(":")
        found = _KEEP.fullmatch(first)
        names = [re.match("[a-z]*", flag) for flag in flags]
        twice = len({name[0] for name in names if name}) < len(flags)
        wrong = [flag for flag in flags if not re.fullmatch(cls.known or "$^", flag)]
        if found is None or (found[2] and int(found[1]) > 100) or wrong or twice:
            more = f", then of {cls.known}" if cls.known else ""
            raise MethodError(
                f"method '{cls.id}:{options}': expected how many experts of a layer are kept{more},"
                f" then a method for these, as in {cls.id}:keep6, {cls.id}:keep75% or "
                f"{cls.id}:keep6+rtn:int4:g64"
            )
        coder = get_method(inner or RAW)
        if coder.scope != "expert" or coder.edits_router:
            raise MethodError(
                f"method '{cls.id}:{options}': {coder.setting} looks at a whole layer; expected "
                "one that codes each expert for itself, as rtn:int4:g64 or bounded:bound"
            )
        return cls(found[1] + found[2], tuple(flags), coder.setting)

    @property
    def setting(self) -> str:
        own = ":".join((self.id, f"keep{self.keep}", *self.flags))
        return own if self.inner == RAW else f"{own}+{self.inner}"

    @property
    def coder(self) -> Method:
        return get_method(self.inner)

    def flag(self, name: str) -> str | None:
        """What stands behind a flag's name: "128" of rank128; None where it was not given."""
        for flag in self.flags:
            if re.fullmatch(rf"{name}[0-9]*", flag):
                return flag.removeprefix(name)
        return None

    def encode(self, group: GroupView, *, threads: int = 1) -> Encoding:
        if group.experts[0].key.shared:  # no router chooses among them
            return Encoding(dict(self._coded(group, threads)))
        edit = self.edit(group)
        kept = self.kept(group, edit)
        coded = self._coded(kept, threads) if kept.experts else {}
        nothing = Payload(b"")
        return Encoding(
            {e.key: coded.get(e.key, dict.fromkeys(e.matrices, nothing)) for e in group.experts},
            router=edit,
        )

    def _coded(self, kept: GroupView, threads: int) -> Mapping[ExpertKey, Any]:
        statistics = kept.coded_by(self.coder.wanted_statistics())
        # Of a merged expert, whose weights are others, no outputs are certified.
        seen = {} if self.merges else kept.seen
        coded: dict[ExpertKey, Any] = {}
        for expert in kept.experts:  # what rounding needs to know of one is as large as it is
            group = GroupView((expert,), statistics, seen)
            coded |= compress(self.coder, group, threads=threads).experts
        return coded

    @abstractmethod
    def edit(self, group: GroupView) -> RouterEdit:
        """What becomes of the layer's routing. group: its experts may have no matrices, where the
        method decides without."""

    @abstractmethod
    def kept(self, group: GroupView, edit: RouterEdit) -> GroupView:
        """The experts that are coded, with the weights they are to have, and their statistics."""

    def count(self, n_experts: int) -> int:
        """How many of so many experts are kept."""
        if self.keep.endswith("%"):
            return max(1, round(n_experts * int(self.keep[:-1]) / 100))
        if int(self.keep) > n_experts:
            raise MethodError(f"keep{self.keep}: there are {n_experts} experts in the layer")
        return int(self.keep)

    @classmethod
    def decode(cls, payload: memoryview, spec: MatrixSpec, shared: Sequence[Any]) -> Array:
        if len(payload):
            raise CorruptionError(f"{len(payload)} bytes of an expert that is not kept: expected 0")
        return np.zeros(spec.shape, np.float32)

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        return _MOST_WEIGHTS


def numbers(group: GroupView) -> list[int]:
    """The experts' numbers in their layer."""
    return [expert.key.expert for expert in group.experts]


def column(group: GroupView, name: str) -> Array:
    """[E, ...] float64: a statistic of each expert of the group, in its order."""
    return np.stack([np.asarray(group.statistics[name][e.key]) for e in group.experts])


def shares(group: GroupView) -> Array:
    """[E] float64: the share of the layer's tokens that the router sent to each expert; equal ones
    where it sent none to any."""
    sent = column(group, "sent")
    return sent / sent.sum() if sent.sum() else np.full(len(sent), 1 / len(sent))


def best(scores: Array, n: int, routing: Routing, *, percent: bool = False) -> list[int]:
    """The places of the n largest of [E] scores, ascending; of equal ones the first. As many of
    each group of the router: where groups do not divide n, percents are rounded.

    Raises MethodError for a number that leaves a token too few experts, or a group too few.
    """
    groups, each = routing.groups, n / routing.groups
    least = -(-routing.top_k // routing.chosen_groups)
    if groups > 1:
        least = max(2, least)  # a group is chosen by the sum of its two best
        if percent:
            each = max(least, round(each))
        elif n % groups:
            nearest = max(least, round(each)) * groups
            raise MethodError(
                f"keep{n}: the router has {groups} groups, and as many of each are kept; the "
                f"nearest is keep{nearest}"
            )
    if each < least:
        of = f"in each of {groups} groups, of which it chooses {routing.chosen_groups}, " \
            if groups > 1 else ""  # fmt: skip
        raise MethodError(
            f"keep{n}: the router sends a token to {routing.top_k} experts; expected {least} or "
            f"more {of}to be left: keep{least * groups} at least"
        )
    size = len(scores) // groups
    found: list[int] = []
    for first in range(0, size * groups, size):
        order = np.argsort(-scores[first : first + size], kind="stable")[: int(each)]
        found += sorted(first + int(place) for place in order)
    return found


def routing_of(group: GroupView) -> Routing:
    """Of the layer. Raises MethodError for some experts of a layer whose router has groups."""
    found = group.routing or Routing(len(group.experts))
    if found.groups > 1 and found.n_experts != len(group.experts):
        raise MethodError(
            f"layer {group.layer}: {len(group.experts)} of {found.n_experts} experts, and the "
            "router divides them into groups; expected all of them"
        )
    return found


def some(group: GroupView, keys: Sequence[ExpertKey]) -> tuple[ExpertView, ...]:
    """Those of its experts."""
    return tuple(expert for expert in group.experts if expert.key in set(keys))
