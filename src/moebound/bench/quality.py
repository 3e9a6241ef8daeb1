"""At equal bytes: what a model loses to each way of making its experts small.

Quantizers and peers set the sizes: each comes to so many bytes, all of them counted. Then every
bounded way is given the bytes of one of them: of a quantizer to within a percent of its experts',
of a peer to within a thousandth of the whole model's. `bound` has one rate for all experts, with
a map a plan, too; `calibrated` has statistics; `sz3` and `cuszp` stand beside quantizers only. All
of ours are real stores, written, checked and loaded; a peer's weights are what its own library
makes of what it stored (`peers/`). What is no routed expert's is bit for bit the original's in all
of them. They are compared to the original on the same problems.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moebound.bench.beside import Beside, Say
from moebound.bench.environment import describe
from moebound.bench.kept import KeptRows
from moebound.bench.peers import CalibrationText, Peer, get_peer, is_answered, run_peer, text_of
from moebound.bench.peers.environments import python_of
from moebound.checkpoint import Checkpoint, experts_name, open_checkpoint
from moebound.errors import MoeboundError
from moebound.evaluate.candidate import stored
from moebound.evaluate.evaluation import Evaluation, Scored, compare_to
from moebound.files.documents import fields_of
from moebound.files.formats.statistics import Statistics
from moebound.methods import codec_of, get_method
from moebound.plan import Budget, Document, Evidence, ExpertSizes, Plan, Scheme, make_plan
from moebound.score import Score
from moebound.store import measure_sizes
from moebound.store.at_size import rate_at
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
OF_THE_WHOLE = 1e-3
"""How near to a peer's the whole model's bytes are brought."""
OF_EXPERTS = 1e-2
"""How near to a quantizer's the experts' are."""
_TRIES = 5


@dataclass(frozen=True)
class QualityRow:
    """One way at one size.

    size_of: the quantizer or peer whose bytes are the budget. n_bytes: of all routed experts,
    everything counted; n_bytes_whole: of all tensors. n_weights, n_parameters: of the same.
    largest_rate: the widest bound, in mean |weight| of its expert; None where nothing is promised.
    max_abs_error: in weight units, over all experts. about: of a peer, its library, version and
    settings.
    """

    method: str
    size_of: str
    n_bytes: int
    n_weights: int
    n_bytes_whole: int
    n_parameters: int
    largest_rate: float | None
    max_abs_error: float
    score: Score
    evaluation: Evaluation
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    @property
    def whole_bits_per_weight(self) -> float:
        return 8 * self.n_bytes_whole / self.n_parameters

    def to_json(self, baseline: Evaluation) -> dict[str, Any]:
        return {
            "method": self.method,
            "size_of": self.size_of,
            "n_bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
            "n_bytes_whole": self.n_bytes_whole,
            "whole_bits_per_weight": self.whole_bits_per_weight,
            "largest_rate": self.largest_rate,
            "max_abs_error": self.max_abs_error,
            "fidelity": self.score.to_json(),
            "total": self.evaluation.total.to_json(),
            "to_original": compare_to(baseline, self.evaluation).to_json(),
            **({"peer": self.about} if self.about else {}),
        }

    def to_kept(self) -> dict[str, Any]:
        """All of it, for `of_kept`."""
        of = self.evaluation
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "score": self.score.to_json(),
            "evaluation": {"source": of.source, "rows": [row.to_json() for row in of.rows]},
        }

    @classmethod
    def of_kept(cls, data: Mapping[str, Any], task: str) -> QualityRow:
        """Raises FormatError."""
        with fields_of("rows that are kept"):
            of = data["evaluation"]
            rows = tuple(Scored(**row) for row in of["rows"])
            return cls(
                **{name: data[name] for name in _PLAIN},
                score=Score.from_json(data["score"]),
                evaluation=Evaluation(of["source"], task, rows),
            )


_PLAIN = (
    "method", "size_of", "n_bytes", "n_weights", "n_bytes_whole", "n_parameters", "largest_rate",
    "max_abs_error", "about",
)  # fmt: skip
"""Fields of a row that JSON has as they are."""


@dataclass(frozen=True)
class QualityReport:
    """baseline: the original's answers. calibration: what statistics and peers were made on; None
    without. rows: by size, in the order measured."""

    source: str
    task: str
    n_problems: int
    baseline: Evaluation
    rows: tuple[QualityRow, ...]
    environment: dict[str, Any]
    calibration: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "moebound.bench.quality",
            "version": 1,
            "source": self.source,
            "task": self.task,
            "n_problems": self.n_problems,
            "calibration": self.calibration,
            "baseline": asdict(self.baseline.total),
            "rows": [row.to_json(self.baseline) for row in self.rows],
            "environment": self.environment,
        }


@dataclass(frozen=True)
class Peers:
    """What the rows of peers take. settings: as `peers.get_peer` knows them. environments: the
    folder with theirs. work: where their checkpoints are kept. text: the file that the statistics
    are of, if it is no task's."""

    settings: Sequence[str]
    work: Path
    environments: Path | None = None
    text: Path | None = None


def run(
    src: str,
    task: Task,
    *,
    quantizers: Sequence[str] = QUANTIZERS,
    peers: Peers | None = None,
    plans: Sequence[Plan] = (),
    sensitivity: Document | None = None,
    calibration: Statistics | None = None,
    limit: int | None = None,
    rows: Path | None = None,
    say: Say = lambda what, done, total: None,
) -> QualityReport:
    """Measure every quantizer and peer, and every bounded way at its size.

    sensitivity: a map to plan with; no planned rows without one. calibration: statistics of the
    model's inputs, for rows of `calibrated`, and for peers, which read the same text. plans: rows
    of their own, each beside the quantizer or peer whose size it has. limit: problems of the task.
    rows: a folder where rows are kept, so that the same call goes on after an interruption.

    Raises BoundViolatedError if a store breaks its promise, and what the parts raise: unknown
    quantizers and peers, and environments that are not there, before any work.
    """
    asked = [] if peers is None else [get_peer(setting) for setting in peers.settings]
    methods = [get_method(name).setting for name in quantizers]
    names = [*methods, *(peer.setting for peer in asked)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MoeboundError(f"{', '.join(twice)}: asked twice; rows go by this name")
    if peers is not None:
        if calibration is None:
            raise MoeboundError("peers read the text that statistics are of: give --calibration")
        for peer in asked:
            if not is_answered(peer, peers.work):
                python_of(peer.environment, peers.environments, f"peer {peer.setting}")
    run_ = _Run(src, task, limit, sensitivity, calibration, peers, say)
    with (
        tempfile.TemporaryDirectory(prefix="moebound-quality-") as temporary,
        KeptRows(rows or Path(temporary), run_.identity()) as kept,
    ):
        return run_.all(methods, asked, plans, kept)


class _Run(Beside):
    """One comparison."""

    def __init__(
        self,
        src: str,
        task: Task,
        limit: int | None,
        sensitivity: Document | None,
        calibration: Statistics | None,
        peers: Peers | None,
        say: Say,
    ) -> None:
        super().__init__(src, task, limit, say)
        self.peers = peers
        self.sensitivity, self.calibration = sensitivity, calibration
        self.checkpoint = open_checkpoint(src)
        if calibration is not None:
            calibration.check_model(experts_name(self.checkpoint), src)
        self.experts = self.checkpoint.experts()
        self.n_weights = sum(expert.size for expert in self.experts)
        self.rest = self.checkpoint.passthrough()
        self.rest_bytes = sum(tensor.n_bytes for tensor in self.rest)
        self.n_parameters = self.n_weights + sum(math.prod(tensor.shape) for tensor in self.rest)
        self.sizes: dict[str, list[ExpertSizes]] = {}
        self.done = 0

    def identity(self) -> dict[str, Any]:
        """What rows are of: those of another are not mixed in."""
        of = None if self.calibration is None else self.calibration.of
        return {
            "model": experts_name(self.checkpoint),
            "task": self.task.name,
            "limit": self.limit,
            "calibration": of and {"text_sha256": of.text_sha256, "moments": of.moments,
                                   "routed": of.routed},
            "sensitivity": self.sensitivity and self.sensitivity.sha256,
        }  # fmt: skip

    def all(
        self, methods: Sequence[str], asked: Sequence[Peer], plans: Sequence[Plan], kept: KeptRows
    ) -> QualityReport:
        planned = [PLANNED] if self.sensitivity is not None else []
        calibrated = self.calibration is not None
        beside = [UNIFORM[0], *planned]
        self.total = len(methods) * (1 + len(UNIFORM) + len(planned) + calibrated)
        self.total += len(asked) * (1 + len(beside) + calibrated) + len(plans)
        loaded = self.load(kept)
        found: list[QualityRow] = []
        for method in methods:
            row = self.row(kept, method, method, partial(self.store, method))
            found.append(row)
            room = OF_EXPERTS * row.n_bytes
            found += self.ways(kept, row, [*UNIFORM, *planned], room)
        if asked:
            assert self.peers is not None
            assert self.calibration is not None
            text = text_of(loaded, self.checkpoint, self.calibration, self.peers.text)
        for peer in asked:
            row = self.row(kept, peer.setting, peer.setting, partial(self.peer, peer, text))
            found.append(row)
            found += self.ways(kept, row, beside, OF_THE_WHOLE * row.n_bytes_whole, among=found)
        for plan in plans:
            found += self.of_plan(kept, plan, found)
        of = None if self.calibration is None else self.calibration.of.to_json()
        return QualityReport(
            self.src, self.task.name, self.n_problems, self.answers, tuple(found), describe(), of
        )

    def ways(
        self,
        kept: KeptRows,
        like: QualityRow,
        ways: Sequence[Way],
        room: float,
        among: Sequence[QualityRow] = (),
    ) -> list[QualityRow]:
        """Ours at the bytes of a row, give or take `room`. among: rows of ours that are taken for
        it where they are as near."""
        makers: dict[str, Callable[[], QualityRow]] = {
            way.name: partial(self.at_size, like, room, self.planned(way)) for way in ways
        }
        if self.calibration is not None:
            makers[CALIBRATED] = lambda: self.at_size(like, room, self.calibrated())
        found = []
        for name, make in makers.items():
            near = [
                row for row in among
                if row.method == name and abs(row.n_bytes - like.n_bytes) <= room
            ]  # fmt: skip
            if near:
                self.done += 1
                found.append(replace(near[0], size_of=like.method))
            else:
                found.append(self.row(kept, name, like.method, make))
        return found

    def row(
        self, kept: KeptRows, method: str, size_of: str, make: Callable[[], QualityRow]
    ) -> QualityRow:
        """A row that is kept already, or made and kept."""
        key = f"{method} at {size_of}"
        at = "" if method == size_of else f" at the size of {size_of}"
        self.say(f"{method}{at}{self.left(self.done)}", self.done, self.total)
        before = kept.get(key)
        if before is not None:
            row = QualityRow.of_kept(before, self.task.name)
        else:
            row = replace(make(), method=method, size_of=size_of)
            kept.add(key, row.to_kept())
            self.made += 1
        self.done += 1
        return row

    def of_plan(self, kept: KeptRows, plan: Plan, found: Sequence[QualityRow]) -> list[QualityRow]:
        """A plan's own row, beside each whose whole model it is as large as; by itself if none."""
        codec = codec_of(plan.method)
        options = {} if codec is not None else {"calibration": self.calibration}
        row = self.row(
            kept, f"{codec or plan.method}{'' if plan.scheme == 'uniform' else ', planned'}",
            f"plan {plan.sha256[:12]}", lambda: self.store(plan, **options),
        )  # fmt: skip
        like = [
            other.method for other in found
            if other.method == other.size_of
            and abs(other.n_bytes - row.n_bytes) <= OF_THE_WHOLE * other.n_bytes_whole
        ]  # fmt: skip
        return [replace(row, size_of=size) for size in like or [row.size_of]]

    def store(self, what: Plan | str, **options: Any) -> QualityRow:
        """A store of ours, measured."""
        with in_a_store(self.checkpoint, what, **options) as (folder, about):
            return self.measured(folder, **about)

    def peer(self, peer: Peer, text: CalibrationText) -> QualityRow:
        assert self.peers is not None
        made = run_peer(
            peer, self.checkpoint, text, self.peers.work, environments=self.peers.environments
        )
        return self.measured(
            made.checkpoint, n_bytes=made.n_bytes, n_weights=self.n_weights, largest_rate=None,
            max_abs_error=made.max_abs_error, about=dict(made.about),
        )  # fmt: skip

    def measured(self, folder: Path, *, n_bytes: int, **about: Any) -> QualityRow:
        """The model in a folder, beside the original."""
        score, evaluation = self.compare(folder)
        return QualityRow(
            "", "", n_bytes=n_bytes, n_bytes_whole=n_bytes + self.rest_bytes,
            n_parameters=self.n_parameters, score=score, evaluation=evaluation, **about,
        )  # fmt: skip

    def planned(self, way: Way) -> Callable[[float], tuple[Plan, dict[str, Any]]]:
        """Stores of a codec, by bits a weight."""

        def make(bits: float) -> tuple[Plan, dict[str, Any]]:
            if way.codec not in self.sizes:
                self.sizes[way.codec] = measure_sizes(self.checkpoint, codec=way.codec)
            plan = make_plan(
                self.sizes[way.codec],
                Evidence(self.sensitivity if way.scheme == "sensitivity" else None),
                Budget(bpw=bits),
                source=self.src,
                codec=way.codec,
                scheme=way.scheme,
            )
            return plan, {}

        return make

    def calibrated(self) -> Callable[[float], tuple[str, dict[str, Any]]]:
        """Stores of `calibrated`, by bits a weight."""
        statistics = self.calibration
        assert statistics is not None
        last: list[tuple[float, float]] = []

        def make(bits: float) -> tuple[str, dict[str, Any]]:
            if last:  # halving a rate costs a bit
                rate = last[-1][1] * 2 ** (last[-1][0] - bits)
            else:
                rate = rate_at(self.checkpoint, CALIBRATED, statistics, bits)
            last.append((bits, rate))
            bound = ErrorBound(rate, "rate", "expert")
            return CALIBRATED, {"bound": bound, "calibration": statistics}

        return make

    def at_size(
        self,
        like: QualityRow,
        room: float,
        make: Callable[[float], tuple[Plan | str, dict[str, Any]]],
    ) -> QualityRow:
        """A store that takes the bytes of a row, give or take `room`: what is asked is set right by
        what came of it. The nearest of a few is taken if none is near enough."""
        wanted = asked = like.bits_per_weight
        best: tuple[float, float] | None = None
        for _ in range(_TRIES):
            what, options = make(asked)
            with in_a_store(self.checkpoint, what, **options) as (folder, about):
                off = about["n_bytes"] - like.n_bytes
                if abs(off) <= room:
                    return self.measured(folder, **about)
            if best is None or abs(off) < best[0]:
                best = abs(off), asked
            asked += wanted - 8 * about["n_bytes"] / self.n_weights
        assert best is not None
        what, options = make(best[1])
        return self.store(what, **options)


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
        made.checked.check(made.summary.method)
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
