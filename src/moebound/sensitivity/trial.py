"""Try a plan on the model itself: what it loses, before a store is written.

    trial = Trial.of(loaded, *unread(sensitivity, 384))
    plan = make_plan(sizes, evidence, budget, source="...", measure=trial.measure)

Every expert is encoded and decoded as planned and put into the model, and the model reads problems
with their solutions; then everything is as it was. The problems are of the map's task, and others
than the map or the statistics read: a plan spends its bytes on what they saw, and loses less there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from moebound.checkpoint import Checkpoint
from moebound.errors import PlanError
from moebound.evaluate.candidate import Original, score
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded
from moebound.evaluate.text import solved_rows
from moebound.files.formats.statistics import Statistics
from moebound.model.fingerprint import of_corners
from moebound.model.live import LiveExperts, live_experts
from moebound.offload.budget import available_memory
from moebound.plan import Document, Measured, Plan
from moebound.score import Tokens
from moebound.sensitivity.planned import planned
from moebound.store.encoded import Memo
from moebound.tasks import get_task
from moebound.tasks.base import Problem, Task

N_PROBLEMS = 384
"""So many because losses are uneven: half of a KL comes from a twentieth of the problems."""

_FLOAT32 = 4
_FAR = 4096
"""Problems of a task among which those that statistics read are looked for."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A loaded model, and what it predicts on some problems of a task before anything is
    changed. tokens: which of theirs count. calibration: for plans that need statistics. memo: of
    experts that were made before."""

    original: Original
    experts: LiveExperts
    task: str
    tokens: Tokens = "all"
    calibration: Statistics | None = None
    memo: Memo | None = None

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        task: Task,
        problems: Sequence[Problem],
        *,
        tokens: Tokens = "all",
        calibration: Statistics | None = None,
        memo: Memo | None = None,
    ) -> Trial:
        """On these problems, read once. Raises TaskError where one has no solution,
        UnsupportedArchitectureError for a model without experts that are known here, MoeboundError
        for statistics of another one."""
        experts = live_experts(loaded.model)
        if calibration is not None:
            calibration.check_model(of_corners(experts), loaded.source.name)
        rows = solved_rows(loaded.tokenizer, task, problems)
        original = Original(loaded.model, Baseline.of(loaded.model, rows))
        return cls(original, experts, task.name, tokens, calibration, memo)

    def measure(self, plan: Plan, layer: int | None = None, expert: int | None = None) -> Measured:
        """What a plan loses on them, of all experts, those of one layer or one of them.

        Raises MoeboundError if it is not for this model, and UnsupportedArchitectureError where
        experts cannot be changed in place: quantized weights, and weights that are not in memory.
        """
        some = [
            key
            for key in self.experts
            if layer in (None, key.layer) and expert in (None, key.expert)
        ]
        changed = planned(
            self.experts, plan, calibration=self.calibration, only=some, memo=self.memo
        )
        return Measured(score(changed, self.original).score, self.task, tokens=self.tokens)


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


def unread_by(
    loaded: Loaded, calibration: Statistics, task: Task, n_problems: int, *, skip: int = 0
) -> list[Problem]:
    """As many problems of a task that statistics were not made with: those behind what they read,
    then those before from `skip` on, which leaves the first for measuring what came of it.

    Of statistics of another text, any problems are. Raises PlanError where the task's problems are
    not those that the statistics read, or none is left.
    """
    if calibration.of.text != task.name:
        return task.problems(skip + n_problems)[skip:] or task.problems(n_problems)
    n_read = calibration.of.n_sequences
    for read in (skip + n_read, _FAR + n_read):  # where it most likely is, then anywhere
        problems = task.problems(read + n_problems)
        rows = solved_rows(loaded.tokenizer, task, problems[:read])
        ids = [_hashed([*prompt, *solution]) for prompt, solution in rows]
        for start in range(len(ids) - n_read, -1, -1):
            behind = start + n_read
            if sha256(b"".join(ids[start:behind])).hexdigest() != calibration.of.text_sha256:
                continue
            chosen = [*problems[behind:], *problems[skip:start]][:n_problems]
            if chosen:
                return chosen
            raise PlanError(
                f"{calibration.folder}: was made with all problems of {task.name}, so none is left "
                "to measure plans on; make it with a --limit"
            )
    raise PlanError(
        f"{calibration.folder}: is of other problems than {task.name!r} has now, so those that it "
        "did not read cannot be told; make it again, or name another --task"
    )


def _hashed(ids: Sequence[int]) -> bytes:
    """As `calibrate.Text.sha256` takes a sequence in."""
    return len(ids).to_bytes(8, "little") + np.array(ids, "<i8").tobytes()


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
