"""The whole road, step by step: answers -> profile -> study -> map -> stores -> plans -> speeds.

Each step is the library's own, with its own files, and goes on where it was stopped. What is
finished is read again from its file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moebound.bench import codec as bench
from moebound.bench.matrices import synthetic
from moebound.bench.report import BenchReport
from moebound.checkpoint import Checkpoint, open_checkpoint, top_k_of
from moebound.codec import get_codec
from moebound.demo.folder import Folder, begin
from moebound.demo.report import (
    Damage,
    ModelFacts,
    Report,
    SampleAnswer,
    StoreRow,
    kept_rate,
)
from moebound.demo.stores import Case, Setup, cases, weight_file_bytes
from moebound.evaluate.evaluation import Evaluation
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.scoring import evaluate
from moebound.evaluate.transcript import read_transcript
from moebound.extras import check
from moebound.files.documents import load_json, save_json
from moebound.files.durable import disk_errors
from moebound.files.formats import sensitivity_map
from moebound.files.rows import KEY, Rows
from moebound.jobs.workers import InProcess, Opens, Processes, Workers, cores
from moebound.paper.report import Report as StudyReport
from moebound.paper.report import make_report, read_study
from moebound.paper.study.measure import Setup as StudySetup
from moebound.paper.study.run import Step, run_study
from moebound.paper.study.suite import Suite
from moebound.paper.study.suite_file import get_suite
from moebound.plan import Budget, Evidence, Plan, make_plan
from moebound.profile.profile import Profile
from moebound.profile.profiling import profile_tasks
from moebound.sensitivity.map.build import Build
from moebound.sensitivity.map.settings import MapSettings
from moebound.store import measure_sizes, open_store, verify
from moebound.tasks import get_task
from moebound.wordmath.builtin import MODELS

SRC, TASK, EASIER = MODELS[0], "wordmath-hard", "wordmath"
RATES = (0.1, 0.3, 0.8)
CODECS = ("bound", "sz3", "zfp")
EXACT_CODEC = "lossless"
PLANNED_CODEC = "bound"
N_PROBLEMS = 128
MAP_PROBLEMS = 32
"""They come behind those that models are compared on: what a plan saves is measured on others."""
MAP_RATES = (0.1, 0.5)
MOST_WORKERS = 2
N_SAMPLE_ANSWERS = 3
FULL_SIZE_MATRIX = "gaussian-rows"
FULL_SIZE_SECONDS = 1.0

Say = Callable[[str, int, int], None]
"""Called with what is being done, and how many steps of how many of it are done."""


@dataclass(frozen=True)
class Asked:
    """What a demo is of. n_problems: of each task, for every accuracy and KL. suite: of the study,
    as `moebound study` takes it. src: the model."""

    rates: tuple[float, ...] = RATES
    codecs: tuple[str, ...] = (*CODECS, EXACT_CODEC)
    n_problems: int = N_PROBLEMS
    suite: str = "quick"
    src: str = SRC

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "rates": list(self.rates),
            "codecs": list(self.codecs),
            "moebound": version("moebound"),
        }

    @property
    def lossy(self) -> list[str]:
        return [codec for codec in self.codecs if get_codec(codec).lossy]


def run(
    folder: Path,
    asked: Asked | None = None,
    *,
    command: str = "moebound demo",
    workers: int | None = None,
    say: Say = lambda what, done, total: None,
) -> Report:
    """Go the whole road, or what is left of it.

    workers: processes that study and compare; None for the cores, two at most. Raises StoreError
    for a folder with somebody else's files (see `folder.begin`), and what the steps raise; a bound
    that does not hold is no exception but a row with `verified` False.
    """
    asked = asked or Asked()
    check("the demo's page", "matplotlib")
    for codec in asked.codecs:
        get_codec(codec).check_installed()
    suite = get_suite(asked.suite)
    place = begin(folder, asked.to_json())
    with one_thread():
        return _Road(place, asked, suite, workers or min(MOST_WORKERS, cores()), say).go(command)


@dataclass
class _Road:
    folder: Folder
    asked: Asked
    suite: Suite
    n_workers: int
    say: Say
    seconds: dict[str, float] = field(default_factory=dict)

    def go(self, command: str) -> Report:
        asked = self.asked
        with self._step("answers of the original"):
            checkpoint, loaded = open_checkpoint(asked.src), load(asked.src)
            original = {task: self._evaluate(loaded, task) for task in (TASK, EASIER)}
        with self._step("profile"):
            profile = self._profile(loaded)
        with self._step("study"):
            study = self._study()
        if PLANNED_CODEC in asked.codecs:
            with self._step("sensitivity map"):
                self._map(loaded)
        with self._workers(Setup(asked.src, TASK, asked.n_problems, self.folder.path)) as hands:
            with self._step("stores, verified and compared"):
                rows = self._measured(cases(asked.codecs, asked.rates), hands)
            with self._step("plans, their stores"):
                plans = self._plans(checkpoint, rows)
                planned = [
                    Case(PLANNED_CODEC, rate, min(asked.rates), plan=self._plan_file(rate))
                    for rate in plans
                ]
                rows += self._measured(planned, hands)
        with self._step("damage"):
            damage = self._damage(rows[0].name)
        with self._step("speeds"):
            speeds = self._speeds()
        samples, samples_of = self._samples(original[TASK], rows)
        return Report(
            command=command,
            task=TASK,
            n_problems=asked.n_problems,
            map_problems=min(MAP_PROBLEMS, asked.n_problems),
            map_rates=MAP_RATES,
            model=_model_facts(asked.src, checkpoint, loaded.model),
            original=original,
            profile=profile,
            study=study,
            plans={case.name: plans[case.rate] for case in planned if case.rate is not None},
            rows=tuple(rows),
            damage=damage,
            samples=samples,
            samples_of=samples_of,
            speeds=speeds,
            seconds=self.seconds,
        )

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        self.say(name, 0, 1)
        yield
        self.seconds[name] = time.monotonic() - begun

    def _evaluate(self, loaded: Loaded, task: str) -> Evaluation:
        return evaluate(
            loaded, get_task(task), limit=self.asked.n_problems, answers=self.folder.answers(task),
            progress=lambda done, total: self.say(f"{task}: answering", done, total),
        )  # fmt: skip

    def _profile(self, loaded: Loaded) -> Profile:
        if self.folder.profile.exists():
            return Profile.load(self.folder.profile)
        task = get_task(TASK)
        problems = task.problems(self.asked.n_problems)
        return profile_tasks(loaded, [(task, problems)], self.folder.profile, text="references")

    def _study(self) -> StudyReport:
        n, suite = self.asked.n_problems, self.suite
        setup = StudySetup(self.asked.src, (TASK,), min(n, suite.n_problems), min(n, suite.n_read))

        def step(now: Step) -> None:
            self.say(f"study: {now.label}", now.done, now.total)

        with self._workers(setup) as hands:
            run_study(self.folder.study, suite, setup, hands, task_names=[TASK], say=step)
        return make_report(read_study(self.folder.study))

    def _map(self, loaded: Loaded) -> None:
        path = self.folder.map
        if path.exists():
            return
        # Without jumps, which plans do not use, and without a sample to compare with.
        settings = MapSettings(rates=MAP_RATES, codec=PLANNED_CODEC, measure="none", n_ties=0)
        n = min(MAP_PROBLEMS, self.asked.n_problems)
        task, skip = get_task(TASK), self.asked.n_problems
        Build.of(loaded, task, n, settings, path, self.say, skip=skip).run()

    def _workers(self, setup: Opens) -> Workers:
        if self.n_workers == 1:
            return InProcess(setup.with_threads(1).open())
        return Processes(setup, self.n_workers)

    def _measured(self, wanted: Sequence[Case], hands: Workers) -> list[StoreRow]:
        """A row of each case, in their order; those that the folder has are not measured again."""
        with disk_errors(self.folder.stores):
            self.folder.stores.mkdir(exist_ok=True)
        with Rows(self.folder.rows) as kept:
            todo = [case for case in wanted if case.name not in kept.found]
            for row in hands.run(todo, {}) if todo else ():
                kept.append({KEY: row.name, **row.to_json()})
                done = sum(case.name in kept.found for case in wanted)
                self.say(f"store {row.name}", done, len(wanted))
            return [StoreRow.from_json(kept.found[case.name]) for case in wanted]

    def _plans(self, checkpoint: Checkpoint, rows: Sequence[StoreRow]) -> dict[float, Plan]:
        """By rate: as many bytes as one bound for all takes there."""
        budgets = {row.rate: row.expert_bits_per_weight for row in rows
                   if row.codec == PLANNED_CODEC and row.rate is not None}  # fmt: skip
        missing = [rate for rate in budgets if not self._plan_file(rate).exists()]
        if missing:
            sizes = measure_sizes(checkpoint, codec=PLANNED_CODEC)
            evidence = Evidence(sensitivity_map.FORMAT.read(self.folder.map))
            for rate in missing:
                plan = make_plan(
                    sizes, evidence, Budget(bpw=budgets[rate]), source=self.asked.src,
                    codec=PLANNED_CODEC,
                )  # fmt: skip
                plan.save(self._plan_file(rate))
        return {rate: Plan.load(self._plan_file(rate)) for rate in budgets}

    def _plan_file(self, rate: float) -> Path:
        return self.folder.plan(None if rate == kept_rate(self.asked.rates) else rate)

    def _damage(self, name: str) -> Damage:
        """Turn over one bit of a copy, and verify it."""
        copy = self.folder.stores / ".damaged"
        with disk_errors(copy):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.folder.stores / name, copy)
        try:
            expert = open_store(copy).experts()[-1]
            tensor = expert.matrices[0].tensor
            at = tensor.offset + tensor.n_bytes // 2
            with disk_errors(tensor.file), tensor.file.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))
            problems = [p for p in verify(copy).problems if p.tensor == tensor.name]
            return Damage(name, tensor.name, problems[0].message if problems else "")
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _speeds(self) -> BenchReport:
        if self.folder.speeds.exists():
            return BenchReport.from_json(load_json(self.folder.speeds))
        found = bench.run(
            synthetic([FULL_SIZE_MATRIX]), self.asked.rates, self.asked.lossy,
            seconds_per_case=FULL_SIZE_SECONDS, threads=1,
            progress=lambda step: self.say(f"speed: {step.label}", step.done, step.total),
        )  # fmt: skip
        save_json(self.folder.speeds, found.to_json())
        return found

    def _samples(
        self, original: Evaluation, rows: Sequence[StoreRow]
    ) -> tuple[tuple[SampleAnswer, ...], str]:
        """What shows the effect: the first problem that the coarsest store solves too, and the
        first that only the original solves; filled up in order. The page says that they were
        chosen."""
        coarsest = max(rows, key=lambda row: (row.rate or 0.0, not row.planned))
        before, after = (
            read_transcript(self.folder.answers(name)).answers for name in (TASK, coarsest.name)
        )
        task = get_task(TASK)
        right = {row.id: row.pia for row in original.rows}
        still = {name: task.judge(*_asked(pair)).pia for name, pair in after.items()}
        both = [name for name, good in right.items() if good and still[name]]
        lost = [name for name, good in right.items() if good and not still[name]]
        order = dict.fromkeys([*both[:1], *lost[: N_SAMPLE_ANSWERS - 1], *both[1:], *right])
        return tuple(
            SampleAnswer(before[name][0].prompt, before[name][1].text, after[name][1].text)
            for name in list(order)[:N_SAMPLE_ANSWERS]
        ), coarsest.name


def _asked(pair: Any) -> tuple[Any, str]:
    problem, output = pair
    return problem, output.text


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices of 2,048 weights, as the first model's are, gain nothing from a second thread, and
    on a busy machine the threads of torch wait for one another many times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _model_facts(src: str, checkpoint: Checkpoint, model: Any) -> ModelFacts:
    experts = checkpoint.experts()
    matrices = [matrix for expert in experts for matrix in expert.matrices]
    return ModelFacts(
        name=src,
        model_type=str(checkpoint.config.get("model_type")),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_moe_layers=len({expert.key.layer for expert in experts}),
        n_experts=len(experts),
        experts_per_token=top_k_of(checkpoint.config),
        expert_weights=sum(expert.size for expert in experts),
        weights_per_matrix=max(matrix.size for matrix in matrices),
        weight_file_bytes=weight_file_bytes(checkpoint.path),
    )
