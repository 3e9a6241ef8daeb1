"""From a model and tasks to a profile on disk: answer, read, count; resumable.

What the model reads is what the paper's did: each prompt, and the model's own greedy answer to it
(MoE-Compression, 2509.07727, section 3.1). Prompt and answer are then read once more, at once, with
the recorder on: the same tokens in the same places choose the same experts as while answering, up
to the rounding of floating point, and what is recorded depends neither on the batch nor on when
other answers ended. The trace is given the order of an answer that is written alone: one step for
the prompt, one for every token after it. End marks are not read: nothing comes after them.

With text "references" the tasks' own solutions stand in place of answers; nothing is generated.

Work is done in parts of PART problems. After each, what is counted so far goes to `FILE.partial`,
and the trace of the part beside the trace file; the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moebound.cache.trace import Trace, join, load_trace
from moebound.errors import MoeboundError
from moebound.evaluate.answering import STOP_WINDOW, end_marks
from moebound.evaluate.decoding import decode
from moebound.evaluate.loading import Loaded
from moebound.evaluate.prompting import encode_prompts, encode_references
from moebound.evaluate.text import Rows, batches, pad
from moebound.files.documents import load_json, save_json
from moebound.profile.profile import Profile, TaskUse
from moebound.profile.routing import Recorder
from moebound.tasks import Problem, Task
from moebound.text.generation import n_positions

Text = Literal["answers", "references"]
Asked = Sequence[tuple[Task, Sequence[Problem]]]
Progress = Callable[[str, int, int], None]
"""Called with what is done, problems done, problems in all."""

PART = 64
READ_TOKENS = 4096
"""Tokens read at once, padding counted."""

PARTIAL = ".partial"


def profile_tasks(
    loaded: Loaded,
    asked: Asked,
    out: Path,
    *,
    text: Text = "answers",
    trace: Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Profile a model on some problems of some tasks, and write the profile (and the trace).

    Goes on where an interrupted run with the same model, tasks and text was; another model or task
    begins anew. Raises MoeboundError for a task without problems, TaskError where there is no
    reference to read, UnsupportedArchitectureError for a dense model, StoreError for a full disk.
    """
    for task, problems in asked:
        if not problems:
            raise MoeboundError(f"task {task.name!r}: no problems to profile with")
    state = _State.open(out, trace, _settings(loaded, asked, text))
    total = sum(len(problems) for _, problems in asked)
    before = 0
    recorder = Recorder(loaded.model, end_ids=())
    for task, problems in asked:
        for start in range(state.done(task.name), len(problems), PART):
            part = problems[start : start + PART]
            rows = _rows(loaded, task, part, text)
            found = replace(_read(loaded, recorder, rows), task=task.name)
            state.add(TaskUse.of(found, task=task.name, text=text), start, found)
            if progress is not None:
                progress(task.name, before + start + len(part), total)
        before += len(problems)
    return state.finish(loaded.source.name, [task.name for task, _ in asked])


def _settings(loaded: Loaded, asked: Asked, text: Text) -> dict[str, Any]:
    """What a run must have in common with one that it goes on from."""
    tasks = [[task.name, [problem.id for problem in problems]] for task, problems in asked]
    return {"source": loaded.source.to_json(), "tasks": tasks, "text": text}


def _rows(loaded: Loaded, task: Task, problems: Sequence[Problem], text: Text) -> Rows:
    """Token ids of each prompt and of what follows it, without the end mark."""
    prompts = encode_prompts(loaded.tokenizer, task, problems, model=loaded.model)
    ends = end_marks(loaded)
    if text == "references":
        solutions = encode_references(loaded.tokenizer, task, problems, model=loaded.model)
        return [(p, [t for t in s if t not in ends])
                for p, s in zip(prompts, solutions, strict=True)]  # fmt: skip
    answers = decode(
        loaded.model,
        prompts,
        max_new_tokens=task.max_new_tokens,
        ends=ends,
        pad=loaded.tokenizer.pad_token_id or 0,
        positions=n_positions(loaded.model),
        stopped=_stopped(loaded.tokenizer, task.stop),
    )
    return [(p, answer.tokens) for p, answer in zip(prompts, answers, strict=True)]


def _stopped(tokenizer: Any, stop: tuple[str, ...]) -> Callable[[list[int]], bool] | None:
    if not stop:
        return None

    def stopped(tokens: list[int]) -> bool:
        written = tokenizer.decode(tokens[-STOP_WINDOW:], skip_special_tokens=True)
        return any(mark in written for mark in stop)

    return stopped


@torch.inference_mode()
def _read(loaded: Loaded, recorder: Recorder, rows: Rows) -> Trace:
    """The routing of prompts and answers, in the order of the rows and as if each were written
    alone."""
    order: list[int] = []
    with recorder:
        for indices in batches(rows, READ_TOKENS):
            batch = pad([rows[index] for index in indices], loaded.tokenizer.pad_token_id or 0)
            loaded.model(
                input_ids=batch.input_ids.to(loaded.device),
                attention_mask=batch.attention_mask.to(loaded.device),
                use_cache=False,
            )
            order += indices
    read = recorder.take(model=loaded.source.name)
    row = np.array(order, np.int32)[read.sequence]
    lengths = np.array([len(prompt) for prompt, _ in rows], np.int32)
    decoded = read.position >= lengths[row]
    chosen = np.lexsort((read.position, row))
    row, decoded = row[chosen], decoded[chosen]
    begins = np.diff(row, prepend=-1) != 0
    return Trace(
        tuple(
            replace(layer, index=layer.index[chosen], weights=layer.weights[chosen])
            for layer in read.layers
        ),
        token=read.token[chosen],
        position=read.position[chosen],
        sequence=row,
        step=(np.cumsum(begins | decoded) - 1).astype(np.int32),
        decode=decoded,
        model=read.model,
    )


@dataclass
class _State:
    """What is counted so far, on disk. uses: by task. counted: problems done, by task."""

    out: Path
    trace: Path | None
    settings: dict[str, Any]
    uses: dict[str, TaskUse]
    counted: dict[str, int]

    @classmethod
    def open(cls, out: Path, trace: Path | None, settings: dict[str, Any]) -> _State:
        settings = {**settings, "trace": None if trace is None else trace.name}
        new = cls(out, trace, settings, {}, {})
        if not new.path.exists():
            return new
        try:
            found = load_json(new.path)
            if found["settings"] != settings:
                return new
            uses = {use["task"]: TaskUse.from_json(use) for use in found["uses"]}
            return cls(out, trace, settings, uses, dict(found["counted"]))
        except (MoeboundError, KeyError, TypeError, ValueError):
            return new  # a leftover of something else

    @property
    def path(self) -> Path:
        return self.out.with_name(self.out.name + PARTIAL)

    def done(self, task: str) -> int:
        return self.counted.get(task, 0)

    def add(self, use: TaskUse, start: int, trace: Trace) -> None:
        """Add a part and write everything down: the trace first, so that no count is without."""
        if self.trace is not None:
            trace.save(self._part(use.task, start))
        before = self.uses.get(use.task)
        self.uses[use.task] = use if before is None else before + use
        self.counted[use.task] = start + use.n_sequences
        uses = [found.to_json() for found in self.uses.values()]
        save_json(self.path, {"settings": self.settings, "uses": uses, "counted": self.counted})

    def finish(self, model: str, tasks: Sequence[str]) -> Profile:
        profile = Profile(model, tuple(self.uses[task] for task in tasks))
        parts: list[Path] = []
        if self.trace is not None:
            parts = [self._part(task, start)
                     for task in tasks for start in range(0, self.counted[task], PART)]  # fmt: skip
            whole = join([load_trace(part) for part in parts])
            replace(whole, model=model, task=",".join(tasks)).save(self.trace)
        profile.save(self.out)
        for leftover in (self.path, *parts):
            leftover.unlink(missing_ok=True)
        return profile

    def _part(self, task: str, start: int) -> Path:
        assert self.trace is not None
        place = [name for name, _ in self.settings["tasks"]].index(task)
        return self.trace.with_name(f"{self.trace.name}.{place}-{start}{PARTIAL}")
