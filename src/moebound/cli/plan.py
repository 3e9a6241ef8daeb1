"""`moebound plan`: a bound for every expert, under a budget."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moebound.cli import exits, wording
from moebound.cli.options import BoundValue, CodecId, IndexSet, PlannedMethod
from moebound.cli.output import Output, output_options
from moebound.cli.progress import progress_bar
from moebound.cli.steps import step_bar
from moebound.cli.widths import (
    WIDTH_SCHEMES,
    check_widths,
    deciding,
    family_of,
    refuse_family,
    without,
)

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

SCHEMES = ["search", "sensitivity", "layer", "frequency", "rfid", "uniform", *WIDTH_SCHEMES]
N_SEARCHED = 96
SEARCH_PROBLEMS = 128
HELD_OUT = 500
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("src")
@click.option("-o", "--output", "out", type=click.Path(dir_okay=False, path_type=Path),
              required=True, help="Where to write the plan, a JSON file.")  # fmt: skip
@click.option("--sensitivity", type=_FILE, help="What `moebound sensitivity` measured.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="STATS",
              help="What `moebound calibrate` wrote of SRC: a plan of method calibrated, searched "
              "for on the model.")  # fmt: skip
@click.option("--study", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A folder that `moebound study` wrote, for its layers' losses.")  # fmt: skip
@click.option("--profile", type=_FILE, help="What `moebound profile` counted.")
@click.option("--bpw", type=BoundValue(), help="At most so many bits per weight, experts only.")
@click.option("--ratio", type=BoundValue(), help="Experts at least so many times smaller.")
@click.option("--max-kl", type=BoundValue(),
              help="The smallest size whose KL is at most this, in nats a token: measured, where "
              "plans are measured, else predicted.")  # fmt: skip
@click.option("--task", help="On whose problems plans are measured.  [default: that of the map or "
              "statistics]")  # fmt: skip
@click.option("--tokens", type=click.Choice(["all", "answers"]), default=None,
              help="Which tokens a plan protects: all that the model reads, or those of solutions "
              "only.  [default: those of the map, else all]")  # fmt: skip
@click.option("--problems", type=click.IntRange(min=2), default=None,
              help="Measure the plan on so many problems that neither map, statistics nor search "
              "read.  [default: 384]")  # fmt: skip
@click.option("--search", "n_searched", type=click.IntRange(min=1), default=None,
              help=f"Measurements of scheme search.  [default: {N_SEARCHED}]")  # fmt: skip
@click.option("--search-problems", type=click.IntRange(min=2), default=None,
              help="Problems that each of them reads, others than the plan is measured on.  "
              f"[default: {SEARCH_PROBLEMS}]")  # fmt: skip
@click.option("--no-measure", is_flag=True,
              help="Load no model, and go by predictions, which are too low.")  # fmt: skip
@click.option("--scheme", type=click.Choice(SCHEMES), default=None,
              help="How to divide the budget.  [default: by the best data given]")  # fmt: skip
@click.option("--per", type=click.Choice(["expert", "matrix"]), default=None,
              help="A bound for each.  [default: matrix, where losses are known so]")  # fmt: skip
@click.option("--codec", type=CodecId(), default=None,
              help="Whose sizes to plan with, and to compress with.  [default: bound]")  # fmt: skip
@click.option("--method", type=PlannedMethod(), default=None,
              help="Instead of a codec: calibrated, or calibrated:k1.5; for schemes of widths "
              "rtn or hqq, as in rtn:g128.  [default: calibrated with --calibration]")  # fmt: skip
@click.option("--widths", type=IndexSet(), default=None,
              help="Bits that a scheme of widths may choose.  [default: the scheme's]")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=None,
              help="Of scheme mptqs_re, which draws.  [default: 0]")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=None,
              help="Experts to work on at a time.  [default: one a CPU]")  # fmt: skip
@output_options
def plan(
    output: Output,
    src: str,
    out: Path,
    sensitivity: Path | None,
    calibration: Path | None,
    study: Path | None,
    profile: Path | None,
    bpw: float | None,
    ratio: float | None,
    max_kl: float | None,
    task: str | None,
    tokens: Tokens | None,
    problems: int | None,
    n_searched: int | None,
    search_problems: int | None,
    no_measure: bool,
    scheme: Scheme | None,
    per: str | None,
    codec: str | None,
    method: str | None,
    widths: set[int] | None,
    seed: int | None,
    jobs: int | None,
) -> int:
    """Choose a bound for each expert of SRC so that the experts fit a budget.

    Exactly one of --bpw, --ratio and --max-kl is the budget. --sensitivity or --study say where
    errors hurt; without them, --profile says which experts are used most. `moebound compress
    --plan` then carries the plan out.

    With --sensitivity the plan is tried on the model, and what it loses on other problems than the
    map's is measured. --max-kl is then kept by what was measured, in a few tries.

    With --calibration experts are rounded by what they see. With a map beside it the plan goes by
    the map; without one, layers' rates are searched for by measuring whole plans, as with --scheme
    search. Killed and started again, a search goes on from where it was. `compress --plan` needs
    the same --calibration.

    The schemes whose names end in _re are other papers' planners. They choose widths for the
    integers of --method rtn or hqq, or for bounds that cost as many bits, and go by --calibration.
    """
    asked = {"--bpw": bpw, "--ratio": ratio, "--max-kl": max_kl}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise click.UsageError(f"expected one of {', '.join(asked)}, found {found}")
    if sensitivity is not None and study is not None:
        raise click.UsageError("--sensitivity and --study both measure losses: give one of them")
    if problems is not None and (no_measure or not (sensitivity or calibration or task)):
        other = "--no-measure" if no_measure else "no --sensitivity, --calibration or --task"
        raise click.UsageError(f"--problems is for measuring with a map: found {other}")
    if codec is not None and method is not None:
        raise click.UsageError("--codec and --method exclude each other")
    by_widths = scheme in WIDTH_SCHEMES
    if codec is not None and calibration is not None and not by_widths:
        raise click.UsageError("--codec rounds without --calibration: leave one of them out")
    # Read once, when torch is loaded; see `moebound sensitivity`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from moebound.checkpoint import open_checkpoint
    from moebound.plan import Budget

    evidence = _read(sensitivity, calibration, study, profile)
    family = family_of(method, scheme)
    if widths is not None and not by_widths and family is None:
        raise click.UsageError("--widths is for schemes of widths")
    if seed is not None and scheme != "mptqs_re":
        raise click.UsageError("--seed is for scheme mptqs_re")
    if family is not None:
        setting = family.setting(4)
    else:
        setting = _setting(codec, method, calibration is not None, by_widths)
    statistics = evidence.calibration
    if by_widths or family is not None:
        evidence = without(evidence, setting)
    asks = n_searched is not None or search_problems is not None
    by_search = calibration is not None and (asks or sensitivity is None)
    searches = not no_measure and (scheme == "search" or (scheme is None and by_search))
    for name, value in (("--search", n_searched), ("--search-problems", search_problems)):
        if value is not None and not searches and max_kl is None:
            raise click.UsageError(f"{name} is for scheme search")
    asked_for = _Asked(
        src,
        open_checkpoint(src),
        evidence,
        Budget(bpw=bpw, ratio=ratio, max_kl=max_kl),
        setting,
        scheme,
        None if per is None else per == "matrix",
        jobs,
        statistics,
        family,
        None if widths is None else tuple(sorted(widths)),
        seed or 0,
    )
    asked_for.check()
    trying = None
    if not no_measure and (evidence.sensitivity or statistics or task):
        protected = tokens or (evidence.map.tokens if evidence.map is not None else "all")
        searches = searches or (max_kl is not None and not asked_for.knows_losses)
        trying = _Trying(
            output, asked_for, out, task, protected, problems, search_problems, searches
        )
    n_most = N_SEARCHED if n_searched is None else n_searched
    try:
        made = asked_for.make(output, trying, searches, n_most)
    except BaseException:
        if trying is not None:
            trying.stopped()
        raise
    made.save(out)
    if trying is not None:
        trying.finished()
    document = made.to_json()
    del document["experts"]
    output.result({"path": str(out), **document}, wording.facts(f"{src} -> {out}", _lines(made)))
    return exits.OK


def _setting(codec: str | None, method: str | None, calibrated: bool, by_widths: bool) -> str:
    """Raises MethodError for a method that plans cannot be made of, PlanError for statistics that
    it does not look at."""
    from moebound.errors import MethodError, PlanError
    from moebound.methods import get_method

    if codec is not None or (method is None and not calibrated):
        return f"bounded:{codec or 'bound'}"
    if method is not None:
        refuse_family(method)
    made = get_method(method or "calibrated")
    if not made.takes_bound:
        raise MethodError(f"method {made.setting!r} knows no bound, and plans choose bounds")
    if calibrated and not made.statistics and not by_widths:
        raise PlanError(f"method {made.setting!r} looks at no statistics: leave out --calibration")
    return made.setting


@dataclass(frozen=True)
class _Asked:
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

    def of_widths(self, output: Output, trying: _Trying | None) -> Plan:
        """A plan of a grid method, measured where that was asked."""
        from dataclasses import replace

        from moebound.plan import make_width_plan

        profile = self.evidence.profile
        made = make_width_plan(
            self.deciding(output), str(self.scheme), self.budget, source=self.checkpoint.name,
            made={} if profile is None else {"profile": profile.describe()},
        )  # fmt: skip
        return made if trying is None else replace(made, measured=trying.measure(made))

    def make(self, output: Output, trying: _Trying | None, searches: bool, n_searched: int) -> Plan:
        from moebound.plan import Search, make_plan
        from moebound.store import Encoded

        calibration = self.evidence.calibration
        if trying is not None:
            trying.check()
        if self.family is not None:
            return self.of_widths(output, trying)
        deciding = self.deciding(output) if self.by_widths else None
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
            )


class _Trying:
    """Plans on the model: what measures them, on which problems."""

    def __init__(
        self,
        output: Output,
        asked: _Asked,
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


def _read(
    sensitivity: Path | None, calibration: Path | None, study: Path | None, profile: Path | None
) -> Evidence:
    from moebound.files.formats import profile as profile_file
    from moebound.files.formats import sensitivity_map
    from moebound.files.formats.statistics import read_statistics
    from moebound.files.formats.study import read_rows
    from moebound.plan import Evidence

    return Evidence(
        None if sensitivity is None else sensitivity_map.FORMAT.read(sensitivity),
        None if study is None else read_rows(study),
        None if profile is None else profile_file.FORMAT.read(profile),
        None if calibration is None else read_statistics(calibration),
    )


def _lines(made: Plan) -> list[tuple[str, str]]:
    asked = ", ".join(f"{name} {value:g}" for name, value in made.budget.items())
    what = "bound" if made.bounds else "width"
    return [
        ("scheme", f"{made.scheme}, a {what} for each {made.made['bound_per']}"),
        ("asked", asked),
        ("experts", f"{len(made.experts)}, {made.n_weights} weights"),
        ("predicted size", f"{wording.n_bytes(made.n_bytes)}, "
         f"{wording.ratio(made.source_bytes, made.n_bytes)}, "
         f"{wording.bits(made.bits_per_weight)}"),
        ("predicted KL", "not known: no losses were given" if made.kl is None
         else f"{made.kl:.3g} nats a token"),
        *_measured(made),
        _given(made),
    ]  # fmt: skip


def _given(made: Plan) -> tuple[str, str]:
    """What experts get."""
    values = sorted(bound.value for bound in made.bounds)
    if values:
        middle = values[len(values) // 2]
        return "rates", f"{values[0]:.3g} to {values[-1]:.3g}, median {middle:.3g}"
    count = Counter(made.method_of(key) for key in made.keys)
    return "methods", ", ".join(f"{n} x {setting}" for setting, n in sorted(count.items()))


def _measured(made: Plan) -> list[tuple[str, str]]:
    found = made.measured
    if found is None:
        return [] if made.kl is None else [("measured KL", "not measured: expect more")]
    from moebound.score import kl_lines

    tried = f", the best of {found.n_tried} plans tried" if found.n_tried > 1 else ""
    return [
        *((f"measured {field.title}", text) for field, text in kl_lines(found.score)),
        ("measured on", f"{found.n_problems} other problems of {found.task}{tried}"),
        ("protects", "all tokens" if found.tokens == "all" else "answers only"),
    ]
