"""What each expert gets: one method and bound for all, or what a plan says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

from moebound.checkpoint import Checkpoint, Expert, Role, top_k_of
from moebound.checkpoint.families import router_groups_of
from moebound.errors import MethodError, PlanError
from moebound.files.formats.statistics import Of, Side, Statistics
from moebound.methods import ExpertView, GroupView, Method, Routing, get_method
from moebound.methods.base import Seen
from moebound.methods.shrinkage import Rule, rule_of, wanted
from moebound.plan import Plan
from moebound.types import ErrorBound, ExpertKey


@dataclass(frozen=True)
class Recipe:
    """method: a setting. bound: of every weight, None for a method that needs none; of a plan, the
    widest. moved: statistics of the model as a method leaves it (`calibrate --after`), by which its
    coder codes what is kept."""

    method: str
    bound: ErrorBound | None
    plan: Plan | None = None
    calibration: Statistics | None = None
    moved: Statistics | None = None

    @classmethod
    def of(
        cls,
        bound: ErrorBound | Plan | None,
        method: str | None,
        calibration: Statistics | None = None,
        moved: Statistics | None = None,
    ) -> Recipe:
        """Raises MethodError for an unknown method, for one that a bound does not go with, for one
        that needs statistics where there are none, and for `moved` of another than it; PlanError
        for another than the plan's; BackendUnavailable where a method's library is missing."""
        made = cls._of(bound, method)
        settings = {made.method} if made.plan is None else made.plan.methods
        for setting in sorted(settings):
            if get_method(setting).wanted_statistics() and calibration is None:
                raise MethodError(
                    f"method {setting!r} needs statistics of the model's inputs: make them with "
                    "`moebound calibrate`, and give the folder with --calibration"
                )
            if moved is not None:
                _check_moved(setting, moved)
        return replace(made, calibration=calibration, moved=moved)

    @classmethod
    def _of(cls, bound: ErrorBound | Plan | None, method: str | None) -> Recipe:
        if isinstance(bound, Plan):
            if method is not None and get_method(method).setting != bound.method:
                raise PlanError(f"method {method!r}: the plan was made for {bound.method!r}")
            made = cls(bound.method, bound.widest, bound)
            for setting in bound.methods:
                get_method(setting).check_installed()
            return made
        chosen = get_method(method or "bounded:bound")
        chosen.check_installed()
        if bound is None and chosen.needs_bound:
            raise MethodError(f"method {chosen.setting!r} needs a bound, and none was given")
        if bound is not None and not chosen.bounded:
            raise MethodError(f"method {chosen.setting!r} knows no bound, and {bound} was given")
        return cls(chosen.setting, bound)

    @cached_property
    def _methods(self) -> dict[str, Method]:
        return {}

    def method_of(self, key: ExpertKey) -> Method:
        """What makes this expert smaller."""
        setting = self.method if self.plan is None else self.plan.method_of(key)
        if setting not in self._methods:
            self._methods[setting] = get_method(setting)
        return self._methods[setting]

    def bounds(self, expert: Expert) -> Mapping[Role, ErrorBound] | None:
        """Of an expert's matrices; None where its method gets none."""
        roles = [matrix.role for matrix in expert.matrices]
        if self.plan is None:
            return None if self.bound is None else dict.fromkeys(roles, self.bound)
        planned = self.plan[expert.key].bounds
        return {role: planned[role] for role in roles} if planned else None

    def seen(
        self, checkpoint: Checkpoint, experts: Iterable[Expert], method: Method, *,
        certify: bool = False,
    ) -> GroupView:  # fmt: skip
        """These experts, read, with their bounds and what this method asks for. certify: with what
        their outputs are certified by. Raises as reading does, FormatError for damaged statistics.
        """
        views = tuple(
            ExpertView(
                expert.key,
                {m.role: checkpoint.read(m) for m in expert.matrices},
                self.bounds(expert),
                frozenset(m.role for m in expert.matrices if m.transposed),
                any(m.interleaved for m in expert.matrices),
            )
            for expert in experts
        )
        keys = [view.key for view in views]
        return GroupView(
            views,
            {}
            if self.calibration is None
            else wanted(self.calibration, method.wanted_statistics(shared=keys[0].shared), keys),
            self._raw(method, keys) if certify else {},
            _routing(checkpoint, method, keys),
            {}
            if self.moved is None or method.coder is None or keys[0].shared
            else wanted(self.moved, method.coder.wanted_statistics(), keys),
        )

    def _raw(self, method: Method, keys: Sequence[ExpertKey]) -> Mapping[ExpertKey, Seen]:
        """What experts' outputs are certified by; of none where the method asks for nothing."""
        found, sides = self.moved or self.calibration, _sides(method)
        if found is None or not sides or keys[0].shared:
            return {}
        return _Raw(found, sides, keys)

    def group_of(self, key: ExpertKey) -> tuple[object, ...]:
        """Experts with equal ones are seen together by their method."""
        method = self.method_of(key)
        if method.scope == "expert":
            return (*key,)
        label = None if self.plan is None else self.plan[key].group
        return (key.layer, key.shared, method.setting, label)

    def describe(self) -> dict[str, object]:
        """Everything that decides what is done, as JSON."""
        settings: Iterable[str] = {self.method} if self.plan is None else self.plan.methods
        versions = {name: get_method(name).versions for name in sorted(settings)}
        return {
            "method": self.method,
            "versions": {name: list(found) for name, found in versions.items()},
            "bound": None if self.bound is None else self.bound.to_json(),
            **({} if self.plan is None else {"plan": self.plan.sha256}),
            **(
                {}
                if self.calibration is None
                else {
                    "calibration": self.calibration.of.to_json(),
                    "shrinkage": rule_of(self.calibration).to_json(),
                }
            ),
            **({} if self.moved is None else {"moved": self.moved.of.to_json()}),
        }

    @property
    def calibrated_by(self) -> tuple[Of, Rule] | None:
        """What the statistics are of that anything here is made by, and how they are shrunk."""
        methods = [self.method] if self.plan is None else self.plan.methods
        asked = any(_sides(get_method(setting)) for setting in methods)
        by = self.moved or self.calibration
        return (by.of, rule_of(by)) if by is not None and asked else None

    @property
    def with_shared(self) -> bool:
        """Whether a plan is for shared experts too."""
        return self.plan is not None and any(e.key.shared for e in self.plan.experts)


@dataclass(frozen=True, eq=False)
class _Raw(Mapping[ExpertKey, Seen]):
    """What experts saw, each read when it is asked for: a layer's second moments are large."""

    statistics: Statistics
    sides: Sequence[Side]
    keys_: Sequence[ExpertKey]

    def __getitem__(self, key: ExpertKey) -> Seen:
        found = self.statistics
        return Seen(found.tokens_of(key), {s: found.moments(key, s) for s in self.sides})

    def __iter__(self) -> Iterator[ExpertKey]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def _check_moved(setting: str, moved: Statistics) -> None:
    """Raises MethodError unless they are of a model as this method leaves it to its coder."""
    coder, own = get_method(setting).coder, setting.partition("+")[0]
    if coder is None or not coder.wanted_statistics():
        raise MethodError(
            f"method {setting!r}: nothing it keeps is coded by inputs, so statistics after it "
            "(--moved) say nothing; leave them out"
        )
    if moved.of.after != own:
        there = "of the whole model" if moved.of.after is None else f"after {moved.of.after}"
        raise MethodError(
            f"{moved.folder}: statistics {there}; expected some after {own}: `moebound calibrate "
            f"--after {own}`"
        )


def _sides(method: Method) -> list[Side]:
    """Whose second moments a method asks for."""
    sides: tuple[Side, ...] = get_args(Side)
    return [side for side in sides if side in method.wanted_statistics()]


def _routing(checkpoint: Checkpoint, method: Method, keys: Sequence[ExpertKey]) -> Routing | None:
    """Of the layer of these experts, for a method that edits it."""
    if not method.edits_router or keys[0].shared:
        return None
    layer = keys[0].layer
    n_experts = sum(expert.key.layer == layer for expert in checkpoint.experts())
    return Routing(n_experts, top_k_of(checkpoint.config), *router_groups_of(checkpoint.config))
