"""A plan: what every expert gets (a method, bounds), what it comes to, and how it was made.

JSON, format "moebound.plan", version 3. All earlier ones are read for ever: 1 knew one codec and
bounds, and 2 measured answers only.
`moebound plan` makes one, `moebound compress --plan` carries it out; a store keeps a copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moebound.checkpoint.shards import is_text
from moebound.errors import BoundError, FormatError, PlanError
from moebound.files.documents import Format, count, fields_of, number
from moebound.files.durable import save_bytes
from moebound.plan.items import Floats, Items
from moebound.plan.joint import Joint
from moebound.plan.measured import Measured
from moebound.types import ErrorBound, ExpertKey

FORMAT = Format("moebound.plan", 3, PlanError)
CODEC_METHOD = "bounded:"
"""The method that keeps bounds, as `methods.get_method` knows it; a codec follows."""


@dataclass(frozen=True)
class PlannedExpert:
    """What one expert gets, and what that should come to.

    bounds: by role of its matrices; empty for a method that knows none. n_bytes: all of it. kl:
    nats, this expert changed alone; None where nothing was measured. method: a setting; None for
    the plan's. group: experts of a layer with one method and one label are seen together, where the
    method looks at several; None is a label too.
    """

    key: ExpertKey
    bounds: Mapping[str, ErrorBound]
    n_weights: int
    n_bytes: int
    kl: float | None = None
    method: str | None = None
    group: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.key.layer,
            "expert": self.key.expert,
            "shared": self.key.shared,
            **({} if self.method is None else {"method": self.method}),
            **({} if self.group is None else {"group": self.group}),
            "bounds": {role: bound.to_json() for role, bound in self.bounds.items()},
            "n_weights": self.n_weights,
            "predicted_bytes": self.n_bytes,
            "predicted_kl": self.kl,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlannedExpert:
        """Raises PlanError, FormatError."""
        key = ExpertKey(
            count(data.get("layer"), "a planned expert's layer"),
            count(data.get("expert"), "a planned expert's number"),
            bool(data.get("shared", False)),
        )
        bounds, method, group = data.get("bounds"), data.get("method"), data.get("group")
        for name, value in (("method", method), ("group", group)):
            if not isinstance(value, str | None):
                raise PlanError(f"{key}: {name}: expected a text, found {value!r}")
        if not isinstance(bounds, dict):
            raise PlanError(f"{key}: bounds: expected one for each projection, found {bounds!r}")
        try:
            resolved = {str(role): ErrorBound.from_json(b) for role, b in bounds.items()}
        except (BoundError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{key}: bounds: {type(error).__name__}: {error}") from error
        kl = data.get("predicted_kl")
        return cls(
            key,
            resolved,
            count(data.get("n_weights"), f"{key}: n_weights"),
            count(data.get("predicted_bytes"), f"{key}: predicted_bytes"),
            None if kl is None else number(kl, f"{key}: predicted_kl"),
            method,
            group,
        )


@dataclass(frozen=True)
class Plan:
    """What to do with a checkpoint's experts. No expert twice, at least one.

    method: a setting, what experts get that name none themselves. scheme: how it was chosen, see
    `schemes`.
    budget: what was asked: {"bpw": x}, {"ratio": x} or {"max_kl": x}.
    source: the checkpoint, as the user named it. source_bytes: of the planned experts in it.
    made: measurements it rests on and figures about them, for people. joint: what the sum of all
    experts' losses says about all of them changed at once. measured: what it really loses, None
    where nobody measured.
    """

    method: str
    scheme: str
    budget: Mapping[str, float]
    source: str
    source_bytes: int
    experts: tuple[PlannedExpert, ...]
    made: Mapping[str, Any] = field(default_factory=dict)
    joint: Joint = field(default_factory=Joint)
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if not self.experts:
            raise PlanError("a plan without experts")
        if len(self._by_key) < len(self.experts):
            seen = set[ExpertKey]()
            twice = [e.key for e in self.experts if e.key in seen or seen.add(e.key)]  # type: ignore[func-returns-value]
            raise PlanError(f"{twice[0]} is planned twice")
        for expert in self.experts:
            if not expert.bounds and (expert.method or self.method).startswith(CODEC_METHOD):
                raise PlanError(
                    f"{expert.key}: bounds: expected one for each projection, found none"
                )

    @cached_property
    def _by_key(self) -> dict[ExpertKey, PlannedExpert]:
        return {expert.key: expert for expert in self.experts}

    def __getitem__(self, key: ExpertKey) -> PlannedExpert:
        """Raises PlanError for an expert that is not planned."""
        try:
            return self._by_key[key]
        except KeyError:
            raise PlanError(f"{key} is not in the plan") from None

    @property
    def keys(self) -> list[ExpertKey]:
        return list(self._by_key)

    def method_of(self, key: ExpertKey) -> str:
        """The setting of this expert's method. Raises PlanError as `[key]`."""
        return self[key].method or self.method

    @property
    def methods(self) -> set[str]:
        """The settings of all experts' methods."""
        return {expert.method or self.method for expert in self.experts}

    @property
    def n_weights(self) -> int:
        return sum(expert.n_weights for expert in self.experts)

    @property
    def n_bytes(self) -> int:
        """Predicted, of all experts' envelopes."""
        return sum(expert.n_bytes for expert in self.experts)

    def with_bytes(self, n_bytes: Mapping[ExpertKey, int]) -> Plan:
        """The same, with what its experts are known to take."""
        experts = tuple(replace(e, n_bytes=n_bytes[e.key]) for e in self.experts)
        return replace(self, experts=experts)

    @property
    def bits_per_weight(self) -> float:
        """Predicted, experts only."""
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0

    @property
    def ratio(self) -> float:
        return self.source_bytes / self.n_bytes if self.n_bytes else 0.0

    @property
    def kl(self) -> float | None:
        """Predicted, of all experts changed at once; None where no loss is known."""
        known = [expert.kl for expert in self.experts if expert.kl is not None]
        return self.joint.kl(sum(known)) if len(known) == len(self.experts) else None

    @property
    def bounds(self) -> list[ErrorBound]:
        """Every bound of every matrix."""
        return [bound for expert in self.experts for bound in expert.bounds.values()]

    @property
    def codec(self) -> str:
        """The codec of the plan's method. Raises PlanError for another than the one that keeps
        bounds."""
        if not self.method.startswith(CODEC_METHOD):
            raise PlanError(f"method {self.method!r}: has no codec")
        return self.method.removeprefix(CODEC_METHOD)

    @property
    def widest(self) -> ErrorBound | None:
        """The widest bound, where all are stated the same way: what holds for every weight that has
        one. None where no expert has."""
        if not self.bounds:
            return None
        first = self.bounds[0]
        if any((b.mode, b.scope) != (first.mode, first.scope) for b in self.bounds):
            raise PlanError("bounds are stated in several ways; expected one mode and scope")
        return max(self.bounds, key=lambda bound: bound.value)

    @cached_property
    def sha256(self) -> str:
        """Of all that decides what is written. The same for ever for plans of version 1, which
        stores name: of those the codec stands in it, and no methods and groups."""
        decisive: list[list[Any]] = [
            [*expert.key, {role: b.to_json() for role, b in sorted(expert.bounds.items())}]
            for expert in sorted(self.experts, key=lambda expert: expert.key)
        ]
        own = {(expert.method, expert.group) for expert in self.experts} != {(None, None)}
        if own:
            for entry, expert in zip(
                decisive, sorted(self.experts, key=lambda expert: expert.key), strict=True
            ):
                entry += [expert.method, expert.group]
        known_to_1 = self.method.startswith(CODEC_METHOD) and not own
        text = json.dumps([self.codec if known_to_1 else self.method, decisive], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self, experts: Iterable[tuple[ExpertKey, Iterable[str]]]) -> None:
        """Whether the plan is for exactly these experts, given with their matrices' roles.

        Shared experts are left out of the comparison unless the plan has some.
        Raises PlanError, naming experts and projections.
        """
        with_shared = any(expert.key.shared for expert in self.experts)
        present = {key: set(roles) for key, roles in experts if with_shared or not key.shared}
        missing = sorted(present.keys() - self._by_key.keys())
        extra = sorted(self._by_key.keys() - present.keys())
        if missing or extra:
            parts = [f"it lacks {_some(missing)}"] if missing else []
            parts += [f"it has {_some(extra)}, which the checkpoint has not"] if extra else []
            raise PlanError(f"the plan does not fit the checkpoint: {'; '.join(parts)}")
        for key, roles in present.items():
            planned = set(self._by_key[key].bounds)
            if planned and planned != roles:
                raise PlanError(
                    f"the plan does not fit the checkpoint: {key} has {', '.join(sorted(roles))}, "
                    f"planned are {', '.join(sorted(planned))}"
                )

    def to_json(self) -> dict[str, Any]:
        return {
            **FORMAT.header,
            "method": self.method,
            "scheme": self.scheme,
            "budget": dict(self.budget),
            "source": self.source,
            "source_bytes": self.source_bytes,
            "predicted": {
                "bytes": self.n_bytes,
                "bits_per_weight": self.bits_per_weight,
                "ratio": self.ratio,
                "kl": self.kl,
            },
            "measured": None if self.measured is None else self.measured.to_json(),
            "joint": self.joint.to_json(),
            "made": dict(self.made),
            "experts": [expert.to_json() for expert in self.experts],
        }

    def to_bytes(self) -> bytes:
        """The JSON file: one expert a line."""
        document = self.to_json()
        experts = document.pop("experts")
        head = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        if not is_text(head):  # a file's name in it may hold bytes that are no text
            head = json.dumps(document, indent=1, allow_nan=False)
        lines = ",\n".join("  " + json.dumps(expert, allow_nan=False) for expert in experts)
        return f'{head[:-2]},\n "experts": [\n{lines}\n ]\n}}\n'.encode()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises PlanError for anything `to_json` cannot have made."""
        try:
            return cls._from_json(data)
        except FormatError as error:
            raise PlanError(str(error)) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Plan:
        experts, budget, made = data.get("experts"), data.get("budget"), data.get("made", {})
        measured = data.get("measured")
        method = data.get("method")
        if data.get("version") == 1:
            method = data.get("codec")
            method = CODEC_METHOD + method if isinstance(method, str) else method
        for name, value, kind in (
            ("experts", experts, list), ("budget", budget, dict), ("made", made, dict),
            ("method", method, str), ("scheme", data.get("scheme"), str),
            ("source", data.get("source"), str),
        ):  # fmt: skip
            if not isinstance(value, kind):
                raise PlanError(f"{name}: expected {kind.__name__}, found {str(value)[:40]!r}")
        assert isinstance(experts, list)
        assert isinstance(budget, dict)
        if not all(isinstance(expert, dict) for expert in experts):
            raise PlanError("experts: expected objects")
        return cls(
            method=str(method),
            scheme=data["scheme"],
            budget={str(k): number(v, f"budget: {k}") for k, v in budget.items()},
            source=data["source"],
            source_bytes=count(data.get("source_bytes"), "source_bytes"),
            experts=tuple(PlannedExpert.from_json(expert) for expert in experts),
            made=made,
            joint=Joint.from_json(data.get("joint", {})),
            measured=None if measured is None else Measured.from_json(measured),
        )

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises StoreError if the disk refuses."""
        save_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises PlanError, naming the file."""
        document = FORMAT.read(path)
        with fields_of(str(path), PlanError):
            return cls.from_json(document.content)


def planned_experts(items: Items, rates: Floats) -> tuple[PlannedExpert, ...]:
    """Items with a rate each, gathered by expert."""
    sizes = items.sizes_at(rates).tolist()
    loss = items.loss_at(rates)
    found: dict[ExpertKey, PlannedExpert] = {}
    for i, (key, roles) in enumerate(zip(items.keys, items.roles, strict=True)):
        bound = ErrorBound(float(rates[i]), "rate", "expert")
        before = found.get(key, PlannedExpert(key, {}, 0, 0, None if loss is None else 0.0))
        found[key] = PlannedExpert(
            key,
            {**before.bounds, **dict.fromkeys(roles, bound)},
            before.n_weights + int(items.n_weights[i]),
            before.n_bytes + sizes[i],
            None if loss is None or before.kl is None else before.kl + float(loss[i]),
        )
    return tuple(found.values())


def _some(keys: list[ExpertKey]) -> str:
    return f"{', '.join(map(str, keys[:5]))}{f' and {len(keys) - 5} more' if keys[5:] else ''}"
