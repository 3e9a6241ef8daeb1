"""What a replay counts, and how it is stored as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FORMAT, VERSION = "moebound.cache", 1


@dataclass(frozen=True)
class LayerCount:
    """One layer (decoder index): experts asked for, found resident, and bytes moved for the rest.

    An expert counts once a visit (forward pass and layer), however many tokens chose it.
    """

    layer: int
    accesses: int
    hits: int
    moved_bytes: int

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0


@dataclass(frozen=True)
class Replay:
    """One policy at one budget. `decode_*`: the part of it in steps that are decode only.

    moved_bytes: loaded into the cache, first loads included. evictions: experts thrown out.
    """

    policy: str
    budget_bytes: int
    accesses: int
    hits: int
    moved_bytes: int
    decode_accesses: int
    decode_hits: int
    decode_moved_bytes: int
    evictions: int
    layers: tuple[LayerCount, ...]

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.accesses

    @property
    def decode_hit_ratio(self) -> float | None:
        """None if no step was decode only."""
        return self.decode_hits / self.decode_accesses if self.decode_accesses else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "hit_ratio": self.hit_ratio,
            "decode_hit_ratio": self.decode_hit_ratio,
            "layers": [asdict(layer) | {"hit_ratio": layer.hit_ratio} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Replay:
        fields = {name: data[name] for name in cls.__dataclass_fields__ if name != "layers"}
        layers = tuple(
            LayerCount(*(layer[name] for name in LayerCount.__dataclass_fields__))
            for layer in data["layers"]
        )
        return cls(**fields, layers=layers)


@dataclass(frozen=True)
class Limit:
    """What no policy can exceed at one budget; see belady.py.

    kind: "belady", the optimum itself, of experts of one size; "space-time", a bound above it.
    hits and moved_bytes are the most and the least there can be, each for itself.
    planned_hits: what evicting the farthest next use reaches, knowing the future; a plan that can
    be carried out. With kind "belady" it is the optimum.
    """

    kind: Literal["belady", "space-time"]
    budget_bytes: int
    accesses: int
    hits: float
    moved_bytes: float
    planned_hits: int

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.accesses

    def share(self, replay: Replay) -> float:
        """Of the hits that are possible, how many the policy had: 0 to 1; 1 where none are."""
        return replay.hits / self.hits if self.hits else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "hit_ratio": self.hit_ratio}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Limit:
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Simulation:
    """One trace under several policies and budgets.

    n_visits: forward passes times layers that chose anything. floor, working: see `Residency`.
    expert_bytes: all experts together, in the cache. replays: by budget, then by policy, as asked.
    """

    model: str
    task: str
    n_tokens: int
    n_steps: int
    n_visits: int
    n_experts: int
    expert_bytes: int
    equal_sizes: bool
    floor: int
    working: int
    replays: tuple[Replay, ...]
    limits: tuple[Limit, ...]

    @property
    def budgets(self) -> tuple[int, ...]:
        return tuple(limit.budget_bytes for limit in self.limits)

    def at(self, budget_bytes: int) -> tuple[Replay, ...]:
        """The replays at this budget."""
        return tuple(replay for replay in self.replays if replay.budget_bytes == budget_bytes)

    def limit(self, budget_bytes: int) -> Limit:
        """Raises KeyError for a budget that was not asked for."""
        for limit in self.limits:
            if limit.budget_bytes == budget_bytes:
                return limit
        raise KeyError(budget_bytes)

    def best(self, budget_bytes: int) -> Replay:
        """The policy that moved the fewest bytes at this budget; of equal ones the first asked."""
        return least_moved(self.at(budget_bytes))

    def to_json(self) -> dict[str, Any]:
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("replays", "limits")
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            **plain,
            "limits": [limit.to_json() for limit in self.limits],
            "replays": [
                replay.to_json() | {"share_of_limit": self.limit(replay.budget_bytes).share(replay)}
                for replay in self.replays
            ],
            "best": {str(budget): self.best(budget).policy for budget in self.budgets},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Simulation:
        fields = {
            name: data[name]
            for name in cls.__dataclass_fields__
            if name not in ("replays", "limits")
        }
        return cls(
            **fields,
            replays=tuple(Replay.from_json(entry) for entry in data["replays"]),
            limits=tuple(Limit.from_json(entry) for entry in data["limits"]),
        )


def least_moved(replays: Sequence[Replay]) -> Replay:
    return min(replays, key=lambda replay: replay.moved_bytes)
