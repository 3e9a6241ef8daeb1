"""A study from beginning to end: profile, baselines, then every condition that has no row yet.

Killed at any point and begun again, it goes on: a row is on disk before the next is begun, and a
condition that has a row is never measured again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebound.errors import MoeboundError
from moebound.files.formats.study import (
    ANSWERS_FILE,
    BASELINE,
    PROFILE_FILE,
    ROWS_FILE,
    Condition,
)
from moebound.files.rows import KEY, Rows
from moebound.jobs.workers import Workers
from moebound.paper.study.folder import Asked, missing, prepare
from moebound.paper.study.measure import Setup
from moebound.paper.study.suite import ModelFacts, Suite, baseline
from moebound.profile.profile import Profile, TaskUse


@dataclass(frozen=True)
class Step:
    """How far a study is. last: the row just finished, None before the first. left_s: seconds, by
    what conditions of each kind took so far; None while unknown."""

    done: int
    total: int
    last: dict[str, Any] | None
    label: str
    left_s: float | None


Say = Callable[[Step], None]


@dataclass(frozen=True)
class Outcome:
    """folder: where the study is. asked: what it is of. n_found: rows that were there before.
    n_measured: rows of this run."""

    folder: Path
    asked: Asked
    n_found: int
    n_measured: int


def run_study(
    folder: Path,
    suite: Suite,
    setup: Setup,
    workers: Workers,
    *,
    task_names: Sequence[str],
    sources: Sequence[str] | None = None,
    n_seeds: int | None = None,
    say: Say = lambda step: None,
) -> Outcome:
    """Measure all conditions of a suite that the folder does not have.

    task_names: as the tasks call themselves. sources, n_seeds: in place of the suite's.

    Raises MoeboundError for a folder of another study (see `folder.prepare`), for places that the
    model does not have, and as `Measurer.run`; StoreError if the disk refuses. Rows that are
    finished stay in any case.
    """
    facts: ModelFacts = workers.call("facts")
    conditions = suite.conditions(facts, task_names, sources=sources, n_seeds=n_seeds)
    asked = Asked(
        facts=facts,
        source=workers.call("source"),
        suite=suite.name,
        tasks=tuple(task_names),
        n_problems=setup.n_problems,
        n_read=setup.n_read,
        n_seeds=suite.n_seeds if n_seeds is None else n_seeds,
        conditions=tuple(conditions),
    )
    prepare(folder, asked)
    with Rows(folder / ROWS_FILE) as rows, Rows(folder / ANSWERS_FILE) as answers:
        todo = missing(conditions, rows.found)
        n_found = len(conditions) - len(todo)
        clock = _Clock(conditions, rows.found, workers.count)
        say(Step(n_found, len(conditions), None, "", clock.left_s(todo)))
        profile = _profile(folder / PROFILE_FILE, facts, task_names, workers) if todo else None
        waiting = {condition.id: condition for condition in todo}
        # The baselines first, and all of them: every comparison needs them, and their answers are
        # likely the others' too.
        for part in (
            [condition for condition in todo if condition.source == BASELINE],
            [condition for condition in todo if condition.source != BASELINE],
        ):
            if not part or profile is None:
                continue
            known = {"profile": profile.to_json(), "answers": _baselines(task_names, answers)}
            for measured in workers.run(part, known):
                key = str(measured.row[KEY])
                if measured.answers is not None and key not in answers.found:
                    answers.append({KEY: key, "answers": measured.answers})
                rows.append(measured.row)
                condition = waiting.pop(key)
                clock.took(condition, float(measured.row["seconds"]))
                done = len(conditions) - len(waiting)
                left_s = clock.left_s(list(waiting.values()))
                say(Step(done, len(conditions), measured.row, condition.label, left_s))
    return Outcome(folder, asked, n_found, len(todo))


def _baselines(tasks: Sequence[str], answers: Rows) -> dict[str, list[str]]:
    """What the model without an error answers, by task, as far as it has been asked."""
    found = {task: answers.found.get(baseline(task).id) for task in tasks}
    return {task: list(row["answers"]) for task, row in found.items() if row is not None}


def _profile(path: Path, facts: ModelFacts, tasks: Sequence[str], workers: Workers) -> Profile:
    """Read it, or make it, or make what it lacks of it."""
    known = Profile.load(path) if path.exists() else None
    if known is not None and known.model != facts.name:
        raise MoeboundError(f"{path}: is of the model {known.model}, not of {facts.name}")
    have = {use.task: use for use in known.tasks} if known is not None else {}
    lacking = [task for task in tasks if task not in have]
    for task in lacking:
        have[task] = TaskUse.from_json(workers.call("task_use", task))
    profile = Profile(facts.name, tuple(have.values()))
    if lacking:
        profile.save(path)
    return profile


class _Clock:
    """Time left, from the mean time of the conditions of a kind: task, answered or only read."""

    def __init__(
        self, conditions: Sequence[Condition], found: dict[str, dict[str, Any]], n_workers: int
    ) -> None:
        self._times: dict[tuple[str, bool], list[float]] = defaultdict(list)
        self._n_workers = n_workers
        for condition in conditions:
            if condition.id in found:
                self.took(condition, float(found[condition.id].get("seconds") or 0.0))

    def took(self, condition: Condition, seconds: float) -> None:
        self._times[condition.task, condition.answers].append(seconds)

    def left_s(self, todo: Sequence[Condition]) -> float | None:
        if not todo:
            return 0.0
        means = {kind: sum(times) / len(times) for kind, times in self._times.items()}
        if not means:
            return None
        most = max(means.values())
        total = sum(means.get((c.task, c.answers), most) for c in todo)
        return total / min(self._n_workers, len(todo))
