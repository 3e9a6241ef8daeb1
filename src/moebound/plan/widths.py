"""What a plan of widths decides on: experts, each with a size and an error at every width.

A width is the bits of a grid method's integers (`Family`). Sizes are of real payloads, envelopes
whole; errors are what rounding does to the block's output (`store/widths.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from moebound.errors import CodecError, MethodError, PlanError
from moebound.methods import get_method
from moebound.plan.items import Floats, Ints
from moebound.types import ExpertKey

GROUP = 128
"""Weights that share a scale, where nobody says: PMQ's and MxMoE's."""


@dataclass(frozen=True)
class Family:
    """A method of integers, at any width: `rtn:g128:coded` without its `int4`."""

    name: str
    group: int = GROUP
    rest: str = ""

    @classmethod
    def of(cls, text: str) -> Self:
        """A width in it (`rtn:int4:g64`) says nothing, the plan chooses widths.

        Raises MethodError for a method that has none.
        """
        name, *options = text.split(":")
        group, rest = GROUP, ""
        for option in options:
            if re.fullmatch(r"g[0-9]{1,13}", option):
                group = int(option[1:])
            elif not re.fullmatch(r"int[1-8]", option):
                rest += f":{option}"
        made = cls(name, group, rest)
        try:
            get_method(made.setting(4))
        except (CodecError, MethodError) as error:
            raise MethodError(
                f"method {text!r}: plans choose bounds, or widths of integers as rtn and hqq have; "
                f"{error}"
            ) from error
        return made

    def setting(self, bits: int, down: int | None = None) -> str:
        """Of so many bits. down: those of down, where they are others."""
        widths = f"{bits}" if down is None or down == bits else f"{bits}-{down}"
        return f"{self.name}:int{widths}:g{self.group}{self.rest}"

    def has(self, bits: int, down: int | None = None) -> bool:
        try:
            get_method(self.setting(bits, down))
        except MethodError:
            return False
        return True

    @property
    def widths(self) -> tuple[int, ...]:
        """All that it has."""
        return tuple(bits for bits in range(1, 9) if self.has(bits))

    @property
    def by_block(self) -> bool:
        """Whether down may have a width of its own."""
        return self.has(3, 4)

    def __str__(self) -> str:
        return f"{self.name}:g{self.group}{self.rest}"


@dataclass(frozen=True, eq=False)
class ExpertWidths:
    """One expert at each of W widths. n_weights, sizes (bytes), errors: by role of its matrices.

    errors: squared, in the residual stream, a token of the calibration text
    (`methods.outputs`). sent, gates: tokens that the router sent to it, and the sum of their
    weights. All three only with statistics. n_bytes: of the source.
    """

    key: ExpertKey
    n_weights: Mapping[str, int]
    n_bytes: int
    sizes: Mapping[str, Ints]
    errors: Mapping[str, Floats] = field(default_factory=dict)
    sent: float | None = None
    gates: float | None = None
    effective_rank: float | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def size(self, roles: Sequence[str] | None = None) -> Ints:
        """[W] of these matrices together; of all."""
        found: Ints = np.sum([self.sizes[r] for r in roles or self.roles], axis=0, dtype=np.int64)
        return found

    def output_errors(self, roles: Sequence[str] | None = None) -> Floats:
        """[W] their norms |Y - Ŷ|: never growing with the width, since a wider one is not taken
        to be worse. Raises PlanError where they are not known."""
        if not self.errors:
            raise PlanError(f"{self.key}: its outputs' errors were not measured")
        squared = np.sum([self.errors[role] for role in roles or self.roles], axis=0)
        return np.minimum.accumulate(np.sqrt(squared))


@dataclass(frozen=True, eq=False)
class Offers:
    """What a plan of widths chooses among. n_tokens: of the calibration text, 0 without one."""

    family: Family
    widths: tuple[int, ...]
    experts: tuple[ExpertWidths, ...]
    n_tokens: int = 0

    @property
    def n_weights(self) -> int:
        return sum(sum(expert.n_weights.values()) for expert in self.experts)

    @property
    def layers(self) -> dict[int, list[int]]:
        """Places of each layer's experts."""
        found: dict[int, list[int]] = {}
        for place, expert in enumerate(self.experts):
            found.setdefault(expert.key.layer, []).append(place)
        return found

    def totals(self) -> Ints:
        """[W] bytes of all experts at one width."""
        found: Ints = np.sum([expert.size() for expert in self.experts], axis=0, dtype=np.int64)
        return found

    def columns(self, widths: Sequence[int]) -> list[int]:
        """Raises PlanError for a width that was not measured."""
        for width in widths:
            if width not in self.widths:
                shown = ", ".join(map(str, self.widths))
                raise PlanError(f"width {width}: expected some of {shown}, which {self.family} has")
        return [self.widths.index(width) for width in sorted(set(widths))]
