"""Which experts: a small language for the sets that the MoE-Compression paper perturbs.

  expert:L:E     one expert by its index (2509.07727, section 3.2.1)
  most-used:L    the expert that is chosen most often in layer L (3.2.2, 3.2.3)
  least-used:L   the one chosen least often
  top:K:L        the K chosen most often in layer L (3.3)
  layer:L        all experts of layer L (3.4)
  group:A-B      the most used expert of each MoE layer from A to B, both included (3.5); groups may
                 overlap, as the paper's do
  all            every expert
  1.12,3.40      a list: layer.expert, or any of the above, separated by commas

L, A and B are decoder indices, as in ExpertKey: dense layers count. Use is that of a `Profile` (of
the task at hand, not of another); of experts used equally often, the one with the lower index
counts as used more.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from moebound.errors import MoeboundError
from moebound.types import ExpertKey


class Usage(Protocol):
    """What a selector asks of a profile."""

    def ranking(self, layer: int) -> Sequence[int]:
        """The layer's experts, from the most used to the least used."""


class Selector(ABC):
    """A set of experts, by description. str() gives the text that it was parsed from, tidied."""

    needs_profile: ClassVar[bool] = False

    def resolve(
        self, experts: Iterable[ExpertKey], usage: Usage | None = None
    ) -> tuple[ExpertKey, ...]:
        """The experts meant, each once, in the order of the model.

        experts: those that exist, `LiveExperts` for one. usage: a routing profile; only selectors
        with `needs_profile` look at it.

        Raises MoeboundError that names a layer or expert that does not exist and those that do, or
        says that a profile is needed.
        """
        model = _Model(experts)
        if self.needs_profile and usage is None:
            raise MoeboundError(
                f"selector {str(self)!r} needs a routing profile, to know which experts are used "
                "most: `moebound profile` makes one"
            )
        return tuple(sorted(set(self._keys(model, usage))))

    @abstractmethod
    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]: ...


@dataclass(frozen=True)
class OneExpert(Selector):
    layer: int
    expert: int

    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]:
        return [model.expert(self.layer, self.expert)]

    def __str__(self) -> str:
        return f"expert:{self.layer}:{self.expert}"


@dataclass(frozen=True)
class ByUse(Selector):
    """The `count` most used experts of a layer; least: the least used ones."""

    layer: int
    count: int = 1
    least: bool = False
    needs_profile: ClassVar[bool] = True

    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]:
        ranked = _ranking(model, usage, self.layer)
        if self.count > len(ranked):
            raise MoeboundError(
                f"selector {str(self)!r}: layer {self.layer} has {len(ranked)} experts only"
            )
        chosen = ranked[-self.count :] if self.least else ranked[: self.count]
        return [model.expert(self.layer, expert) for expert in chosen]

    def __str__(self) -> str:
        if self.least:
            return f"least-used:{self.layer}"
        return f"most-used:{self.layer}" if self.count == 1 else f"top:{self.count}:{self.layer}"


@dataclass(frozen=True)
class WholeLayer(Selector):
    layer: int

    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]:
        return model.in_layer(self.layer)

    def __str__(self) -> str:
        return f"layer:{self.layer}"


@dataclass(frozen=True)
class Group(Selector):
    """Dense layers between the two are passed over; the two must have experts."""

    first: int
    last: int
    needs_profile: ClassVar[bool] = True

    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]:
        model.in_layer(self.first)
        model.in_layer(self.last)
        return [
            model.expert(layer, _ranking(model, usage, layer)[0])
            for layer in model.layers
            if self.first <= layer <= self.last
        ]

    def __str__(self) -> str:
        return f"group:{self.first}-{self.last}"


@dataclass(frozen=True)
class Everything(Selector):
    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]:
        return model.keys

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True)
class Union(Selector):
    parts: tuple[Selector, ...]

    @property
    def needs_profile(self) -> bool:  # type: ignore[override]
        return any(part.needs_profile for part in self.parts)

    def _keys(self, model: _Model, usage: Usage | None) -> Iterable[ExpertKey]:
        return [key for part in self.parts for key in part._keys(model, usage)]

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))


_FORMS = (
    (r"(\d+)\.(\d+)", OneExpert),
    (r"expert:(\d+):(\d+)", OneExpert),
    (r"most-used:(\d+)", lambda layer: ByUse(layer)),
    (r"least-used:(\d+)", lambda layer: ByUse(layer, least=True)),
    (r"top:(\d+):(\d+)", lambda count, layer: ByUse(layer, count)),
    (r"layer:(\d+)", WholeLayer),
    (r"group:(\d+)-(\d+)", Group),
    (r"all", Everything),
)
FORMS = "expert:L:E, most-used:L, least-used:L, top:K:L, layer:L, group:A-B, all, or a list as 1.12"


def parse_selector(text: str) -> Selector:
    """Raises MoeboundError for a text that is no selector, with the forms there are."""
    parts = [_parse_part(part.strip(), text) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else Union(tuple(parts))


def _parse_part(part: str, text: str) -> Selector:
    for form, make in _FORMS:
        found = re.fullmatch(form, part, flags=re.ASCII)
        if found:
            selector: Selector = make(*map(int, found.groups()))
            _refuse_empty(selector, part)
            return selector
    where = "" if part == text else f" in {text!r}"
    raise MoeboundError(f"selector {part!r}{where}: expected one of {FORMS}")


def _refuse_empty(selector: Selector, part: str) -> None:
    if isinstance(selector, ByUse) and selector.count < 1:
        raise MoeboundError(f"selector {part!r}: top 0 of a layer are no experts")
    if isinstance(selector, Group) and selector.first > selector.last:
        raise MoeboundError(f"selector {part!r}: the group ends before it begins")


class _Model:
    """The experts that exist, and words for those that do not."""

    def __init__(self, experts: Iterable[ExpertKey]) -> None:
        self.keys: Collection[ExpertKey] = sorted(set(experts))
        self.layers = sorted({key.layer for key in self.keys})

    def in_layer(self, layer: int) -> list[ExpertKey]:
        found = [key for key in self.keys if key.layer == layer]
        if not found:
            raise MoeboundError(
                f"layer {layer} has no experts; layers with experts: {_ranges(self.layers)}"
            )
        return found

    def expert(self, layer: int, expert: int) -> ExpertKey:
        found = self.in_layer(layer)
        key = ExpertKey(layer, expert)
        if key not in found:
            raise MoeboundError(
                f"layer {layer} has no expert {expert}; it has {_ranges(k.expert for k in found)}"
            )
        return key


def _ranking(model: _Model, usage: Usage | None, layer: int) -> Sequence[int]:
    assert usage is not None  # resolve() asked
    model.in_layer(layer)
    return usage.ranking(layer)


def _ranges(indices: Iterable[int]) -> str:
    """0-3, 7"""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
