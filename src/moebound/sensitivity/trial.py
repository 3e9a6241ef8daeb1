"""Try a plan on the model itself: what it loses, before a store is written.

    trial = Trial.of(loaded, *unread(sensitivity, 384))
    plan = make_plan(sizes, evidence, budget, source="...", measure=trial.measure)

Every expert is encoded and decoded as planned and put into the model, and the model reads problems
with their solutions; then everything is as it was. The problems are of the map's task, and others
than the map read: a plan spends its bytes on what the map saw, and loses less there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moebound.checkpoint import Checkpoint
from moebound.errors import PlanError
from moebound.evaluate.candidate import Original, score
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded
from moebound.evaluate.text import solved_rows
from moebound.model.live import LiveExperts, live_experts
from moebound.offload.budget import available_memory
from moebound.plan import Document, Measured, Plan
from moebound.sensitivity.planned import planned
from moebound.tasks import get_task
from moebound.tasks.base import Problem, Task

N_PROBLEMS = 384
"""So many because losses are uneven: half of a KL comes from a twentieth of the problems."""

_FLOAT32 = 4


@dataclass(frozen=True, eq=False)
class Trial:
    """A loaded model, and what it predicts on some problems of a task before anything is
    changed."""

    original: Original
    experts: LiveExperts
    task: str

    @classmethod
    def of(cls, loaded: Loaded, task: Task, problems: Sequence[Problem]) -> Trial:
        """On these problems, read once. Raises TaskError where one has no solution,
        UnsupportedArchitectureError for a model without experts that are known here."""
        experts = live_experts(loaded.model)
        rows = solved_rows(loaded.tokenizer, task, problems)
        return cls(Original(loaded.model, Baseline.of(loaded.model, rows)), experts, task.name)

    def measure(self, plan: Plan) -> Measured:
        """What a plan loses on them. Raises MoeboundError if it is not for this model, and
        UnsupportedArchitectureError where experts cannot be changed in place: quantized weights,
        and weights that are not in memory."""
        found = score(planned(self.experts, plan), self.original)
        return Measured(found.score, self.task)


def unread(sensitivity: Document, n_problems: int) -> tuple[Task, list[Problem]]:
    """A map's task, and as many of its problems that the map did not read: those behind what it
    read, then those before; fewer where the task has no more.

    Raises PlanError for a map that does not say what it read, or read everything; TaskError for a
    task that is not there.
    """
    where, content = sensitivity.path, sensitivity.content
    name, skip, n_read = (content.get(field) for field in ("task", "skip", "n_prompts"))
    if not isinstance(name, str) or not isinstance(skip, int) or not isinstance(n_read, int):
        raise PlanError(
            f"{where}: does not say which problems it was made with (task, skip, n_prompts), so "
            "others cannot be chosen; make it again with `moebound sensitivity`"
        )
    task = get_task(name)
    behind = skip + n_read
    problems = task.problems(behind + n_problems)
    chosen = [*problems[behind:], *problems[:skip]][:n_problems]
    if not chosen:
        raise PlanError(
            f"{where}: was made with all {n_read} problems of {name}, so none is left to measure a "
            "plan on; make it with a --limit"
        )
    return task, chosen


def check_memory(checkpoint: Checkpoint) -> None:
    """Raises PlanError where a trial of this model would not fit in memory: all of it in float32,
    and a copy of its experts, to be put back."""
    weights = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    kept = sum(expert.size for expert in checkpoint.experts())
    needed, free = _FLOAT32 * (weights + kept), available_memory(torch.device("cpu"))
    if needed > free:
        raise PlanError(
            f"{checkpoint.path}: measuring a plan takes {needed / 2**30:.1f} GiB (the model in "
            f"float32, and its experts once more), and {free / 2**30:.1f} GiB are free"
        )
