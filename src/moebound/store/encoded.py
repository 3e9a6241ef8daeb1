"""Experts as plans have them, encoded once and remembered: how many bytes, and which weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from threading import Lock

from moebound.checkpoint import Checkpoint, Expert, Role
from moebound.codec import thread_count
from moebound.files.formats.statistics import Statistics
from moebound.jobs.ordered import in_order
from moebound.methods import compress
from moebound.plan import Plan, PlannedExpert
from moebound.store.recipe import Recipe
from moebound.types import Array, ExpertKey


@dataclass(frozen=True, eq=False)
class Made:
    """What a method made of one expert: its weights, as they come back, and its bytes."""

    weights: Mapping[Role, Array]
    n_bytes: int


class Memo:
    """Experts that were made before. Weights are held as long as there is room, sizes for ever."""

    def __init__(self, room: int = 1 << 30) -> None:
        self._room, self._held, self._lock = room, 0, Lock()
        self._made: OrderedDict[object, Made] = OrderedDict()
        self._sizes: dict[object, int] = {}

    def get(self, name: object) -> Made | None:
        with self._lock:
            found = self._made.get(name)
            if found is not None:
                self._made.move_to_end(name)
        return found

    def n_bytes(self, name: object) -> int | None:
        return self._sizes.get(name)

    def keep(self, name: object, made: Made) -> Made:
        with self._lock:
            self._sizes[name] = made.n_bytes
            if name not in self._made:
                self._made[name] = made
                self._held += _held(made)
            while self._held > self._room and len(self._made) > 1:
                self._held -= _held(self._made.popitem(last=False)[1])
        return made


def _held(made: Made) -> int:
    return sum(array.nbytes for array in made.weights.values())


def name_of(setting: str, entry: PlannedExpert) -> tuple[object, ...]:
    """What is made of an expert alone, of one model, depends on this."""
    return entry.key, setting, tuple(sorted(entry.bounds.items()))


class Encoded:
    """What plans of a checkpoint really take, expert by expert: the bytes that `compress` writes.

    For methods that look at one expert at a time. memo: where it is remembered. jobs: experts at a
    time. Raises as `compress` does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibration: Statistics | None = None,
        *,
        memo: Memo | None = None,
        jobs: int | None = None,
    ) -> None:
        self._checkpoint, self._calibration = checkpoint, calibration
        self.memo = Memo() if memo is None else memo
        self._jobs = thread_count() if jobs is None else jobs

    def __call__(self, plan: Plan) -> dict[ExpertKey, int]:
        """Bytes of each expert, envelopes whole."""
        recipe = Recipe.of(plan, None, self._calibration)

        def make(expert: Expert) -> int:
            method = recipe.method_of(expert.key)
            name = name_of(method.setting, plan[expert.key])
            known = self.memo.n_bytes(name)
            if known is not None:
                return known
            made = compress(method, recipe.seen(self._checkpoint, [expert], method))
            return self.memo.keep(name, Made(made.weights(expert.key), made.n_bytes)).n_bytes

        experts = self._checkpoint.experts()
        with closing(in_order(make, experts, jobs=self._jobs)) as sizes:
            return {expert.key: n for expert, n in zip(experts, sizes, strict=True)}
