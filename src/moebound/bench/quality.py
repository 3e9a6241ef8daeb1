"""At equal bytes: what a model loses to each way of making its experts small.

Quantizers set the sizes: each comes to so many bytes, all of them counted. Then every bounded way
is given the bytes of one of them, to within a percent: `bound`, `sz3` and `cuszp` with one rate for
all experts, `bound` with a plan, and `calibrated` with statistics. All are real stores, written,
checked and loaded, and compared to the original on the same problems.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebound.bench.at_size import rate_at
from moebound.bench.environment import describe
from moebound.checkpoint import Checkpoint, experts_name, open_checkpoint
from moebound.errors import BoundViolatedError
from moebound.evaluate.candidate import Original, in_folder, score, stored
from moebound.evaluate.evaluation import Evaluation, compare_to, with_answers
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import load
from moebound.evaluate.scoring import evaluate
from moebound.evaluate.text import solved_rows
from moebound.files.formats.statistics import Statistics
from moebound.methods import get_method
from moebound.plan import Budget, Document, Evidence, ExpertSizes, Plan, Scheme, make_plan
from moebound.score import Score
from moebound.store import measure_sizes
from moebound.tasks import Task
from moebound.types import ErrorBound

QUANTIZERS = (
    "rtn:int4:g64",
    "rtn:int4:g64:coded",
    "rtn:int4:g128",
    "rtn:int4:g128:coded",
    "hqq:int4:g64",
    "rtn:int3:g64",
    "rtn:int3:g64:coded",
    "rtn:int3:g128",
    "rtn:int3:g128:coded",
    "hqq:int3:g64",
)

Say = Callable[[str, int, int], None]
"""Called with what is being measured, rows done, and rows in all."""


@dataclass(frozen=True)
class Way:
    """A bounded way to spend bytes."""

    name: str
    codec: str
    scheme: Scheme


UNIFORM = (
    Way("bound", "bound", "uniform"),
    Way("sz3", "sz3", "uniform"),
    Way("cuszp", "cuszp:fixed", "uniform"),
)
PLANNED = Way("bound, planned", "bound", "sensitivity")
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class QualityRow:
    """One way at one size.

    size_of: the quantizer whose bytes are the budget. n_bytes: of all routed experts, everything
    counted. largest_rate: the widest bound, in mean |weight| of its expert; None where nothing is
    promised. max_abs_error: in weight units, over all experts.
    """

    method: str
    size_of: str
    n_bytes: int
    n_weights: int
    largest_rate: float | None
    max_abs_error: float
    score: Score
    evaluation: Evaluation

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    def to_json(self, baseline: Evaluation) -> dict[str, Any]:
        return {
            "method": self.method,
            "size_of": self.size_of,
            "n_bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
            "largest_rate": self.largest_rate,
            "max_abs_error": self.max_abs_error,
            "fidelity": self.score.to_json(),
            "total": self.evaluation.total.to_json(),
            "to_original": compare_to(baseline, self.evaluation).to_json(),
        }


@dataclass(frozen=True)
class QualityReport:
    """baseline: the original's answers. rows: by size, in the order measured."""

    source: str
    task: str
    n_problems: int
    baseline: Evaluation
    rows: tuple[QualityRow, ...]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "moebound.bench.quality",
            "version": 1,
            "source": self.source,
            "task": self.task,
            "n_problems": self.n_problems,
            "baseline": asdict(self.baseline.total),
            "rows": [row.to_json(self.baseline) for row in self.rows],
            "environment": self.environment,
        }


def run(
    src: str,
    task: Task,
    *,
    quantizers: Sequence[str] = QUANTIZERS,
    sensitivity: Document | None = None,
    calibration: Statistics | None = None,
    limit: int | None = None,
    say: Say = lambda what, done, total: None,
) -> QualityReport:
    """Measure every quantizer, and every bounded way at its size.

    sensitivity: a map to plan with; no planned rows without one. calibration: statistics of the
    model's inputs, for rows of `calibrated`. limit: problems of the task.
    Raises BoundViolatedError if a store breaks its promise, and what the parts raise: unknown
    quantizers before any work.
    """
    methods = [get_method(name).setting for name in quantizers]
    ways = [*UNIFORM, *([PLANNED] if sensitivity is not None else [])]
    total = len(methods) * (1 + len(ways) + (calibration is not None))
    say("loading", 0, total)
    checkpoint = open_checkpoint(src)
    if calibration is not None:
        calibration.check_model(experts_name(checkpoint), src)
    loaded = load(src)
    problems = task.problems(limit)
    original = Original(
        loaded.model, Baseline.of(loaded.model, solved_rows(loaded.tokenizer, task, problems))
    )
    answers = evaluate(loaded, task, limit=limit)
    sizes: dict[str, list[ExpertSizes]] = {}
    rows: list[QualityRow] = []

    def measure(name: str, size_of: str, what: Plan | str, **options: Any) -> QualityRow:
        with in_a_store(checkpoint, what, **options) as (folder, about):
            found = score(
                in_folder(folder), original, ask=lambda one: evaluate(one, task, limit=limit)
            )
        scored = with_answers(found.score, answers, found.asked)
        rows.append(QualityRow(name, size_of, **about, score=scored, evaluation=found.asked))
        return rows[-1]

    for method in methods:
        say(method, len(rows), total)
        bits = measure(method, method, method).bits_per_weight
        for way in ways:
            say(f"{way.name} at {bits:.2f} bits", len(rows), total)
            if way.codec not in sizes:
                sizes[way.codec] = measure_sizes(checkpoint, codec=way.codec)
            plan = make_plan(
                sizes[way.codec],
                Evidence(sensitivity if way.scheme == "sensitivity" else None),
                Budget(bpw=bits),
                source=src,
                codec=way.codec,
                scheme=way.scheme,
            )
            measure(way.name, method, plan)
        if calibration is not None:
            say(f"{CALIBRATED} at {bits:.2f} bits", len(rows), total)
            rate = rate_at(checkpoint, CALIBRATED, calibration, bits)
            bound = ErrorBound(rate, "rate", "expert")
            measure(CALIBRATED, method, CALIBRATED, bound=bound, calibration=calibration)
    return QualityReport(src, task.name, len(problems), answers, tuple(rows), describe())


@contextmanager
def in_a_store(
    checkpoint: Checkpoint, what: Plan | str, *, bound: ErrorBound | None = None, **options: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A store on disk, checked, for as long as the `with` lasts; and what it came to. what: a plan,
    or the setting of a method, with the bound that it keeps if it knows one. options: further ones
    of `compress`."""
    plan = what if isinstance(what, Plan) else None
    if plan is None:
        options["method"] = what
    work = Path(tempfile.mkdtemp(prefix="moebound-quality-"))
    try:
        made = stored(checkpoint, work / "store", bound if plan is None else plan, **options)
        if not made.checked.ok:
            found = made.checked.problems[0]
            raise BoundViolatedError(
                f"{made.summary.method}: a store breaks its promise or is damaged: {found.tensor}: "
                f"{found.message}"
            )
        asked = bound if plan is None else plan.widest
        widest = None if asked is None else asked.value
        yield (
            made.path,
            {
                "n_bytes": made.summary.expert_bytes_after,
                "n_weights": made.summary.n_weights,
                "largest_rate": widest,
                "max_abs_error": made.summary.max_abs_error,
            },
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
