"""A task from beginning to end: problems, answers, scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moebound.errors import TaskError
from moebound.evaluate.answering import Output, Progress, answer_in_batches
from moebound.evaluate.evaluation import Evaluation, score
from moebound.evaluate.loading import Loaded
from moebound.evaluate.transcript import Recorder
from moebound.tasks.base import Task


def evaluate(
    loaded: Loaded,
    task: Task,
    *,
    limit: int | None = None,
    batch: int | None = None,
    answers: Path | None = None,
    drafts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer the first `limit` problems of a task, and score the answers.

    answers: a file where they are kept (see transcript.py). Where it has some of the same model,
    task and settings already, only the others are asked. drafts: by problem id, what the answers
    may be, such as another model's: they save time and change nothing (see drafts.py).

    Raises TaskError for a task without problems, and what its parts raise.
    """
    problems = task.problems(limit)
    if not problems:
        raise TaskError(f"task {task.name!r} has no problems")
    if answers is None:
        found: dict[str, Output] = {}
        recorder = None
    else:
        recorder = Recorder(
            answers,
            source=loaded.source.to_json(),
            task=task.name,
            settings={"max_new_tokens": task.max_new_tokens},
        )
        # A problem that reads differently now is another problem, whatever its id.
        found = {
            problem.id: recorder.known[problem.id][1]
            for problem in problems
            if problem.id in recorder.known
            and recorder.known[problem.id][0].prompt == problem.prompt
        }
    try:
        missing = [problem for problem in problems if problem.id not in found]
        guesses = None if drafts is None else [drafts.get(problem.id, "") for problem in missing]

        def ended(n: int) -> None:
            if progress is not None:
                progress(len(found) + n, len(problems))

        ended(0)
        for indices, outputs in answer_in_batches(
            loaded, task, missing, batch=batch, drafts=guesses, ended=ended
        ):
            asked = [missing[index] for index in indices]
            if recorder is not None:
                recorder.add(zip(asked, outputs, strict=True))
            found.update((p.id, output) for p, output in zip(asked, outputs, strict=True))
            if progress is not None:
                progress(len(found), len(problems))
    finally:
        if recorder is not None:
            recorder.close()
    rows = tuple(score(task, problem, found[problem.id]) for problem in problems)
    return Evaluation(loaded.source.to_json(), task.name, rows)
