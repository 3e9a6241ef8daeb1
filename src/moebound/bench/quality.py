"""At equal bytes: what a model loses to each way of making its experts small.

Quantizers set the sizes: each comes to so many bytes, all of them counted (`quantizers.py`). Then
every bounded way is given the bytes of one of them, to within a percent: `bound`, `sz3` and
`cuszp` with one rate for all experts, and `bound` with a plan. Those are real stores, written,
checked and loaded; the quantizers' weights are put into the model in place. All are compared to
the original on the same problems.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebound.bench.environment import describe
from moebound.checkpoint import Checkpoint, open_checkpoint
from moebound.errors import BoundViolatedError
from moebound.evaluate.candidate import Original, Result, in_folder, score, stored
from moebound.evaluate.evaluation import Evaluation, compare_to, with_answers
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import load
from moebound.evaluate.scoring import evaluate
from moebound.evaluate.text import solved_rows
from moebound.model.live import live_experts
from moebound.plan import Budget, Document, Evidence, ExpertSizes, Plan, Scheme, make_plan
from moebound.score import Score
from moebound.sensitivity.noise import parse_source
from moebound.sensitivity.perturb import perturbed
from moebound.store import measure_sizes, open_store
from moebound.tasks import Task

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
    limit: int | None = None,
    say: Say = lambda what, done, total: None,
) -> QualityReport:
    """Measure every quantizer, and every bounded way at its size.

    sensitivity: a map to plan with; no planned rows without one. limit: problems of the task.
    Raises BoundViolatedError if a store breaks its promise, and what the parts raise: unknown
    quantizers before any work.
    """
    sources = [parse_source(name) for name in quantizers]
    ways = [*UNIFORM, *([PLANNED] if sensitivity is not None else [])]
    total = len(sources) * (1 + len(ways))
    say("loading", 0, total)
    checkpoint = open_checkpoint(src)
    loaded = load(src)
    problems = task.problems(limit)
    original = Original(
        loaded.model, Baseline.of(loaded.model, solved_rows(loaded.tokenizer, task, problems))
    )
    answers = evaluate(loaded, task, limit=limit)
    live = live_experts(loaded.model)
    sizes: dict[str, list[ExpertSizes]] = {}
    rows: list[QualityRow] = []

    def keep(name: str, size_of: str, found: Result[Any], **about: Any) -> None:
        scored = with_answers(found.score, answers, found.asked)
        rows.append(QualityRow(name, size_of, **about, score=scored, evaluation=found.asked))

    for source in sources:
        say(source.id, len(rows), total)
        found = score(
            perturbed(live, source, None),
            original,
            ask=lambda _: evaluate(loaded, task, limit=limit),
        )
        realised = found.entered
        assert realised.n_bytes is not None
        keep(
            source.id,
            source.id,
            found,
            n_bytes=realised.n_bytes,
            n_weights=realised.n_weights,
            largest_rate=None,
            max_abs_error=realised.max_abs_error,
        )
        bits = 8 * rows[-1].n_bytes / rows[-1].n_weights
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
            with in_a_store(checkpoint, plan) as (folder, about):
                of_store = score(
                    in_folder(folder), original, ask=lambda one: evaluate(one, task, limit=limit)
                )
            keep(way.name, source.id, of_store, **about)
    return QualityReport(src, task.name, len(problems), answers, tuple(rows), describe())


@contextmanager
def in_a_store(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A store on disk, checked, for as long as the `with` lasts; and what it came to."""
    work = Path(tempfile.mkdtemp(prefix="moebound-quality-"))
    try:
        made = stored(checkpoint, work / "store", plan)
        if not made.checked.ok:
            raise BoundViolatedError(f"codec {plan.codec}: a store breaks its bound or is damaged")
        errors = [
            matrix.record.certificate.max_abs_error
            for expert in open_store(made.path).experts()
            for matrix in expert.matrices
        ]
        yield (
            made.path,
            {
                "n_bytes": made.summary.expert_bytes_after,
                "n_weights": made.summary.n_weights,
                "largest_rate": plan.widest.value if plan.widest else None,
                "max_abs_error": max(errors),
            },
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
