"""One loaded model, and what it does under one condition after another.

Everything that a worker does is a method here, with plain data in and out, so that a worker may be
this process, another one, or another machine: see `jobs/workers.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from moebound.checkpoint import top_k_of
from moebound.errors import MoeboundError
from moebound.evaluate.answering import answer
from moebound.evaluate.candidate import Original, score
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.prompting import encode_prompts, encode_references
from moebound.files.formats.study import BASELINE, Condition
from moebound.model.fingerprint import of_state
from moebound.model.live import live_experts
from moebound.paper.study.reading import Pair, Reading
from moebound.paper.study.suite import ModelFacts, whole_layer
from moebound.profile.profile import Profile, TaskUse
from moebound.profile.routing import Recorder
from moebound.score.record import finite
from moebound.sensitivity.noise import parse_source
from moebound.sensitivity.perturb import Realised, perturbed
from moebound.sensitivity.selectors import parse_selector
from moebound.tasks import Problem, Task, get_task

_PROFILE_BATCH = 64


@dataclass(frozen=True)
class Setup:
    """How a worker gets its model and problems. Plain data. src, dtype, device, experts: as
    `loading.load`. threads: of torch; None leaves it alone. batch: prompts answered at a time,
    None for as many as pay."""

    src: str
    tasks: tuple[str, ...]
    n_problems: int
    n_read: int
    dtype: str = "float32"
    device: str = "cpu"
    experts: str = "auto"
    threads: int | None = None
    batch: int | None = None

    def with_threads(self, threads: int) -> Setup:
        return replace(self, threads=threads)

    def open(self) -> Measurer:
        """Load the model. Raises CheckpointError, UnsupportedArchitectureError, TaskError."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        tasks = [get_task(text) for text in self.tasks]
        loaded = load(self.src, dtype=self.dtype, device=self.device, experts=self.experts)
        return Measurer(loaded, tasks, self)


@dataclass(frozen=True)
class Measured:
    """A finished condition. row: as in rows.jsonl. answers: what the model wrote, problem by
    problem; None if it was not asked."""

    row: dict[str, Any]
    answers: list[str] | None


class Measurer:
    """A model with the problems of some tasks. Not for several threads."""

    def __init__(self, loaded: Loaded, tasks: Sequence[Task], setup: Setup) -> None:
        self._loaded, self._setup = loaded, setup
        self._experts = live_experts(loaded.model)
        self._tasks = {task.name: task for task in tasks}
        self._problems: dict[str, list[Problem]] = {}
        self._readings: dict[str, Reading] = {}
        self._profile: Profile | None = None
        self._drafts: dict[str, list[str]] = {}

    def facts(self) -> ModelFacts:
        first = self._experts.layers[0]
        return ModelFacts(
            name=self._loaded.source.name,
            fingerprint=of_state(self._loaded.model),
            layers=self._experts.layers,
            n_experts=len(self._experts.in_layer(first)),
            top_k=top_k_of(self._loaded.model.config.to_dict()),
        )

    def source(self) -> dict[str, str]:
        """How the model was loaded, for records."""
        return self._loaded.source.to_json()

    def task_use(self, task: str) -> dict[str, Any]:
        """Which experts the task uses, as JSON of `TaskUse`."""
        pairs, text = self._pairs(task, self._setup.n_problems)
        with torch.inference_mode(), Recorder(self._loaded.model, end_ids=()) as recorder:
            for start in range(0, len(pairs), _PROFILE_BATCH):
                inputs = _padded(pairs[start : start + _PROFILE_BATCH], self._loaded.device)
                self._loaded.model(**inputs, use_cache=False)
            trace = recorder.take(model=self._loaded.source.name, task=task)
        return TaskUse.of(trace, task=task, text=text).to_json()

    def use(self, known: Mapping[str, Any]) -> None:
        """What is known of the model without an error. "profile": says what "most used" means, by
        a condition's own task. "answers": by task, what it answers: drafts, which save time where
        an error changes few answers, and change nothing (see evaluate/drafts.py)."""
        self._profile = Profile.from_json(known["profile"])
        self._drafts = {str(task): list(texts) for task, texts in known["answers"].items()}

    def run(self, condition: Condition) -> Measured:
        """Put the error in, measure, take it out. The weights are then what they were, bit for
        bit, whatever happens.

        Raises MoeboundError for experts that do not exist, CodecError and BackendUnavailable as
        the source does.
        """
        begun = time.perf_counter()
        reading = self._reading(condition.task)
        keys = []
        if condition.source != BASELINE:
            usage = None if self._profile is None else self._profile.only(condition.task)
            keys = list(parse_selector(condition.selector).resolve(self._experts, usage))
        layers = sorted({key.layer for key in keys})
        first = layers[0] if layers and reading.starts_at(layers[0]) else 0
        candidate: AbstractContextManager[Realised | None] = nullcontext()
        if condition.source != BASELINE:
            source, experts = parse_source(condition.source), self._experts.pick(keys)
            candidate = perturbed(experts, source, condition.bound, seed=condition.seed)
        found = score(
            candidate,
            Original(self._loaded.model, reading.starting(first)),
            ask=lambda _: self._answers(condition.task) if condition.answers else None,
        )
        realised, read = found.entered, found.score
        layer = whole_layer(condition.selector)
        row = {
            "condition": condition.id,
            "task": condition.task,
            "table": condition.table,
            "selector": condition.selector,
            "experts_changed": len(keys),
            "layers": layers,
            # For `plan --study`: the condition is all experts of this layer.
            **({} if layer is None else {"layer": layer}),
            "source": condition.source,
            "rate": condition.rate,
            "seed": condition.seed,
            **self._judged(condition.task, found.asked),
            # Names of the first version; "score" has these figures and all others.
            "kl": finite(read.answer_kl_nats),
            "top1": read.answer_top1_agreement,
            "n_positions": read.n_answer_tokens,
            "where": read.where,
            "score": read.to_json(),
            "realised": None if realised is None else realised.to_json(),
            "seconds": round(time.perf_counter() - begun, 3),
        }
        return Measured(row, found.asked)

    def _answers(self, task: str) -> list[str]:
        problems = self._problems_of(task)
        drafts = self._drafts.get(task)
        if drafts is not None and len(drafts) != len(problems):
            drafts = None
        outputs = answer(
            self._loaded, self._tasks[task], problems, batch=self._setup.batch, drafts=drafts
        )
        return [output.text for output in outputs]

    def _judged(self, task: str, answers: list[str] | None) -> dict[str, Any]:
        """Counts, and which problems were right: bit i of the number is problem i."""
        if answers is None:
            return {"n": 0, "ica": None, "pia": None, "valid": None, "right": None}
        verdicts = [
            self._tasks[task].judge(problem, text)
            for problem, text in zip(self._problems_of(task), answers, strict=True)
        ]
        right = {
            "ica": sum(verdict.ica << i for i, verdict in enumerate(verdicts)),
            "pia": sum(verdict.pia << i for i, verdict in enumerate(verdicts)),
        }
        return {
            "n": len(verdicts),
            "ica": right["ica"].bit_count(),
            "pia": right["pia"].bit_count(),
            "valid": sum(verdict.valid for verdict in verdicts),
            "right": {name: format(bits, "x") for name, bits in right.items()},
        }

    def _problems_of(self, task: str) -> list[Problem]:
        if task not in self._tasks:
            raise MoeboundError(f"task {task!r} is not among {', '.join(self._tasks)}")
        if task not in self._problems:
            self._problems[task] = self._tasks[task].problems(self._setup.n_problems)
        return self._problems[task]

    def _reading(self, task: str) -> Reading:
        if task not in self._readings:
            pairs, _ = self._pairs(task, self._setup.n_read)
            self._readings[task] = Reading(self._loaded.model, self._experts, pairs)
        return self._readings[task]

    def _pairs(self, task: str, limit: int) -> tuple[list[Pair], str]:
        """The first prompts with reference solutions; without those, with the model's answers."""
        asked, tokenizer = self._tasks[task], self._loaded.tokenizer
        problems = self._problems_of(task)[:limit]
        prompts = encode_prompts(tokenizer, asked, problems, model=self._loaded.model)
        if all(problem.reference for problem in problems):
            solutions = encode_references(tokenizer, asked, problems, model=self._loaded.model)
            return list(zip(prompts, solutions, strict=True)), "references"
        problems, prompts = problems[: self._setup.n_read], prompts[: self._setup.n_read]
        outputs = answer(self._loaded, asked, problems, batch=self._setup.batch)
        texts = [output.text for output in outputs]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        pairs = [(p, [*ids, *end]) for p, ids in zip(prompts, encoded, strict=True) if ids or end]
        if not pairs:
            raise MoeboundError(
                f"task {task!r}: no solutions to read, and the model writes nothing"
            )
        return pairs, "answers"


def _padded(pairs: Sequence[Pair], device: torch.device) -> dict[str, torch.Tensor]:
    rows = [[*prompt, *solution] for prompt, solution in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
