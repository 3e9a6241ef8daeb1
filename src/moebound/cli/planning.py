"""What `moebound plan` makes: what was asked for, and what tries plans on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moebound.cli.output import Output
from moebound.cli.progress import progress_bar
from moebound.cli.steps import step_bar
from moebound.cli.widths import WIDTH_SCHEMES, check_widths, deciding

if TYPE_CHECKING:
    from moebound.checkpoint import Checkpoint
    from moebound.evaluate.loading import Loaded
    from moebound.files.formats.statistics import Statistics
    from moebound.plan import (
        Budget,
        Deciding,
        Evidence,
        ExpertSizes,
        Family,
        Measured,
        Plan,
        Scheme,
    )  # fmt: skip
    from moebound.score import Tokens
    from moebound.sensitivity.trial import Trial
    from moebound.sensitivity.tries import Tries
    from moebound.tasks.base import Problem, Task
    from moebound.types import ExpertKey

SEARCH_PROBLEMS = 128
HELD_OUT = 500
"""The first of a task, which `eval` and `bench` read."""


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for."""

    src: str
    checkpoint: Checkpoint
    evidence: Evidence
    budget: Budget
    setting: str
    scheme: Scheme | None
    per_role: bool | None
    jobs: int | None
    statistics: Statistics | None = None
    family: Family | None = None
    widths: tuple[int, ...] | None = None
    seed: int = 0

    @property
    def by_widths(self) -> bool:
        return self.family is not None or self.scheme in WIDTH_SCHEMES

    def check(self) -> None:
        """Statistics that are missing, or another model's, before any work."""
        from moebound.checkpoint import experts_name
        from moebound.errors import MethodError
        from moebound.methods import get_method

        found = self.statistics
        if self.by_widths:
            check_widths(str(self.scheme), self.family, self.evidence, found)
        if found is not None:
            found.check_model(experts_name(self.checkpoint), self.src)
        elif get_method(self.setting).statistics:
            raise MethodError(
                f"method {self.setting!r} needs statistics of the model's inputs: make them with "
                "`moebound calibrate`, and give the folder with --calibration"
            )

    @property
    def knows_losses(self) -> bool:
        """Whether a size can be found for a loss without measuring any plan."""
        given = self.evidence.sensitivity is not None or self.evidence.study is not None
        return given and self.setting.startswith("bounded:")

    def sizes(self, output: Output) -> list[ExpertSizes]:
        from moebound.store import measure_calibrated, measure_sizes

        with progress_bar(output, "measuring sizes") as progress:
            if self.evidence.calibration is None:
                codec = self.setting.removeprefix("bounded:")
                return measure_sizes(
                    self.checkpoint, codec=codec, ranks=self.scheme == "rfid", jobs=self.jobs,
                    progress=progress,
                )  # fmt: skip
            weights = sum(expert.size for expert in self.checkpoint.experts())
            most = self.budget.n_bytes(n_weights=weights, source_bytes=self.checkpoint.expert_bytes)
            return measure_calibrated(
                self.checkpoint, self.evidence.calibration, method=self.setting,
                bits_per_weight=None if most is None else 8 * most / weights,
                plain_rates=() if self.evidence.map is None else self.evidence.map.bounds,
                jobs=self.jobs, progress=progress,
            )  # fmt: skip

    def deciding(self, output: Output) -> Deciding:
        return deciding(
            output, self.checkpoint, str(self.scheme), self.family, self.evidence, self.statistics,
            widths=self.widths, seed=self.seed, jobs=self.jobs,
        )  # fmt: skip

    def of_widths(self, output: Output, trying: Trying | None) -> Plan:
        """A plan of a grid method, measured where that was asked."""
        from dataclasses import replace

        from moebound.plan import make_width_plan

        profile = self.evidence.profile
        made = make_width_plan(
            self.deciding(output), str(self.scheme), self.budget, source=self.checkpoint.name,
            made={} if profile is None else {"profile": profile.describe()},
        )  # fmt: skip
        return made if trying is None else replace(made, measured=trying.measure(made))

    def make(self, output: Output, trying: Trying | None, searches: bool, n_searched: int) -> Plan:
        from moebound.plan import Search, make_plan
        from moebound.store import Encoded, fisher_bounds

        calibration = self.evidence.calibration
        if trying is not None:
            trying.check()
        if self.family is not None:
            return self.of_widths(output, trying)
        deciding = self.deciding(output) if self.by_widths else None
        widest = None
        scheme = self.scheme or ("search" if searches else self.evidence.scheme)
        if scheme == "fisher" and calibration is not None:
            with progress_bar(output, "reading statistics") as progress:
                widest = fisher_bounds(
                    self.checkpoint, calibration, jobs=self.jobs, progress=progress
                )
        sizes = self.sizes(output)
        encoded: Callable[[Plan], dict[ExpertKey, int]] | None = None
        if calibration is not None:
            memo = trying.memo if trying is not None else None
            encoded = Encoded(self.checkpoint, calibration, memo=memo, jobs=self.jobs)
        with step_bar(output) as say:
            search = None
            if trying is not None and trying.searches:
                tries = trying.tries(encoded)
                encoded = tries.sizes if encoded is not None else None
                search = Search(tries, n_searched, say)
            return make_plan(
                sizes,
                self.evidence,
                self.budget,
                source=self.checkpoint.name,
                method=self.setting,
                scheme=self.scheme,
                per_role=self.per_role,
                measure=None if trying is None else trying.measure,
                encoded=encoded,
                search=search,
                deciding=deciding,
                widest=widest,
            )


class Trying:
    """Plans on the model: what measures them, on which problems."""

    def __init__(
        self,
        output: Output,
        asked: Asked,
        out: Path,
        task: str | None,
        tokens: Tokens,
        problems: int | None,
        search_problems: int | None,
        searches: bool,
    ) -> None:
        from moebound.sensitivity.trial import N_PROBLEMS
        from moebound.store import Memo

        self.output, self.asked, self.out, self.tokens = output, asked, out, tokens
        self.memo = Memo()
        self._task, self.searches = task, searches
        self._n_measured = N_PROBLEMS if problems is None else problems
        self._n_search = SEARCH_PROBLEMS if search_problems is None else search_problems
        self._tries: Tries | None = None

    def check(self) -> None:
        """What can be known before long work. Raises MoeboundError where plans cannot be tried."""
        from moebound.sensitivity.trial import check_memory

        with _hinted():
            check_memory(self.asked.checkpoint)
            if self.asked.statistics is None:
                _ = self._text  # with statistics it takes the tokenizer

    @cached_property
    def _loaded(self) -> Loaded:
        """When there is a plan to try: what cannot be planned says so sooner."""
        from moebound.evaluate.loading import load

        return load(self.asked.src)

    @cached_property
    def _text(self) -> tuple[Task, list[Problem]]:
        """A task, and problems of it that nothing has read: the search's, then the others."""
        from moebound.sensitivity.trial import unread, unread_by
        from moebound.tasks import get_task

        evidence, n = self.asked.evidence, self._n_search + self._n_measured
        statistics = self.asked.statistics
        n = n if self.searches else self._n_measured
        if statistics is not None:
            mapped = None if evidence.map is None else evidence.map.task
            task = get_task(self._task or mapped or statistics.of.text)
            read = self._mapped(task)
            most = n + len(read)
            found = unread_by(self._loaded, statistics, task, most, skip=HELD_OUT)
            return task, [problem for problem in found if problem.id not in read][:n]
        if evidence.sensitivity is not None and self._task is None:
            return unread(evidence.sensitivity, n)
        assert self._task is not None
        task = get_task(self._task)
        return task, task.problems(HELD_OUT + n)[HELD_OUT:] or task.problems(n)

    def _mapped(self, task: Task) -> set[str]:
        """Problems of a task that the map read."""
        found = self.asked.evidence.map
        if found is None or found.task != task.name or found.skip is None:
            return set()
        read = task.problems(found.skip + found.n_prompts)[found.skip :]
        return {problem.id for problem in read}

    def _trial(self, of_search: bool) -> Trial:
        from moebound.errors import PlanError
        from moebound.sensitivity.trial import Trial

        task, problems = self._text
        if self.searches:
            # Fewer than are wanted are shared out alike.
            short = len(problems) < self._n_search + self._n_measured
            at = len(problems) // 2 if short else self._n_search
            problems = problems[:at] if of_search else problems[at:]
        if not problems:
            raise PlanError(f"{task.name}: has too few problems to search on some and measure on "
                            "others")  # fmt: skip
        return Trial.of(
            self._loaded, task, problems, tokens=self.tokens,
            calibration=self.asked.evidence.calibration, memo=self.memo,
        )  # fmt: skip

    def tries(self, encoded: Callable[[Plan], dict[ExpertKey, int]] | None) -> Tries:
        from moebound.checkpoint import experts_name
        from moebound.sensitivity.tries import Tries

        calibration = self.asked.evidence.calibration
        header = {
            "model": experts_name(self.asked.checkpoint),
            "calibration": None if calibration is None else calibration.of.to_json(),
            "task": self._task,
            "problems": self._n_search,
            "tokens": self.tokens,
        }
        self._tries = Tries(lambda: self._trial(True), encoded or _predicted, self.out, header)
        if self._tries.n_found:
            self.output.note(f"going on from {self._tries.n_found} steps of an earlier run")
        return self._tries

    @cached_property
    def _measuring(self) -> Trial:
        return self._trial(False)

    def measure(self, plan: Plan) -> Measured:
        from moebound.score import kl_lines

        with _hinted():
            found = self._measuring.measure(plan)
        read = ", ".join(f"{field.title} {text}" for field, text in kl_lines(found.score))
        predicted = "" if plan.kl is None else f", {plan.kl:.3g} predicted"
        self.output.note(f"{plan.bits_per_weight:.3f} bits per weight: {read} measured{predicted}")
        return found

    def finished(self) -> None:
        if self._tries is not None:
            self._tries.remove()

    def stopped(self) -> None:
        if self._tries is not None:
            self._tries.close()


def _predicted(plan: Plan) -> dict[ExpertKey, int]:
    return {expert.key: expert.n_bytes for expert in plan.experts}


@contextmanager
def _hinted() -> Iterator[None]:
    from moebound.errors import MoeboundError

    try:
        yield
    except MoeboundError as error:
        hint = "--no-measure plans without measuring, by predictions"
        raise type(error)(f"{error}. {hint}") from error
