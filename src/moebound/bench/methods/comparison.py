"""Every method at the same bytes: made, checked, loaded, and compared with the original.

A row is one method at one size, in bits a weight of the routed experts, everything counted, within
a percent. All are real stores, made by a process of their own (`making.py`), verified, loaded as
`from_pretrained` loads them, and compared with the original on the same problems; what is no routed
expert's is bit for bit the original's in all of them. What a method cannot come to is a row, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from moebound.bench.beside import Beside, Say
from moebound.bench.environment import describe
from moebound.bench.kept import KeptRows
from moebound.bench.methods.parts import BasePart, Done, MethodPart, Part, Parts, parts
from moebound.bench.methods.place import Place
from moebound.bench.methods.planned import FISHER
from moebound.bench.methods.residuals import BaseRow
from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.bench.methods.sizing import AGAIN, sizing_of
from moebound.checkpoint import experts_name, open_checkpoint
from moebound.errors import BackendUnavailable, MoeboundError
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded
from moebound.files.formats.statistics import Statistics
from moebound.jobs.workers import Hire, Opening
from moebound.methods import get_method
from moebound.tasks import Task

BITS = (8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5)
_LOW_RANK = ("svd", "d2_moe_fixed", "mobe_fixed", "rfid_re")
"""Whom the RFID-MoE paper compares, at shares of the parameters removed."""

_QUANTIZERS = (
    *("rtn", "rtn:coded", "hqq", "milo_fixed", "gptq_re", "awq_re", "moequant_re", "qmoe_re"),
    *(f"moqe_re:int{bits}" for bits in range(2, 9)),
)
_BOUNDED = ("bound", "calibrated")
_BASES = (
    *_LOW_RANK,
    *("moe_i2_re", "soco_lite", "resmoe_fixed", "modegpt_re"),
    # As published they spend 16 bits on a number, which is dear: the same with 8, bases in 5.
    *("svd:f8", "d2_moe_fixed:f8:base5", "mobe_fixed:f8", "rfid_re:f8", "moe_i2_re:f8"),
    *("soco_lite:f8", "resmoe_fixed:f8:base5", "modegpt_re:q4", "modegpt_re:q8"),
)
_KEEPING = (
    *("frequency", "reap_re", "lu_re", "mone_re"),
    *("m_smoe_re", "hc_smoe_fixed", "sub_moe_re"),
)
COMPARED = (*_LOW_RANK, *_KEEPING)
"""What is measured at shares removed, which is how their papers state sizes."""
_CODED = tuple(f"{name}+{coder}" for name in _KEEPING for coder in ("rtn", "bound"))
_CUT = ("modegpt_re:k0.9+calibrated", "modegpt_re:k0.7+calibrated")
_AGAIN = ("reap_re+calibrated", "hc_smoe_fixed+calibrated", _CUT[1])
"""What is coded by inputs is measured with statistics of the whole model, and of what is kept."""
_PAIRS = ("puzzle_moe_re:seed0", "puzzle_moe_re:seed0+rtn")
_RESIDUALS = (
    "residual:svd:r2:f8",
    "residual:d2_moe_fixed:r0:base3",
    "residual:resmoe_fixed:k0:base4",
)
BASES = (
    *("svd:r0", "svd:r2:f8", "svd:b1:f4", "rfid_re:b1:f8", "milo_fixed:b3"),
    *("d2_moe_fixed:r0:base3", "d2_moe_fixed:r0:base5", "d2_moe_fixed:r2:f8:base3"),
    *("resmoe_fixed:k0:base4", "modegpt_re:k0.25:q4", "mobe_fixed:b1:f8:s100"),
)
"""Whose residuals are compared with plain `bound`. svd:r0 is none: what frames cost."""
METHODS = (
    *(*_BOUNDED, *_QUANTIZERS, *_BASES, *_KEEPING, *_CODED, *_CUT, *_AGAIN[:2]),
    *(*(f"{AGAIN}{name}" for name in _AGAIN), *_PAIRS, *_RESIDUALS),
)
"""What is measured if nobody says: all there are, as they are published and in fewer bits; and the
plan by Fisher statistics where there are any."""


def run(
    src: str,
    task: Task,
    *,
    methods: Sequence[str] | None = None,
    bits: Sequence[float] = BITS,
    removed: Sequence[float] = (),
    bases: Sequence[str] | None = None,
    calibration: Statistics | None = None,
    fisher: Statistics | None = None,
    limit: int | None = None,
    answers: int | None = None,
    rows: Path | None = None,
    workers: Hire | None = None,
    say: Say = lambda what, done, total: None,
) -> MethodsReport:
    """Measure every method at every size.

    methods: as `sizing.py` knows them; None for METHODS, without those whose library is not
    installed. removed: percents of the experts' bytes, at which COMPARED are measured, too.
    bases: whose residuals are compared with plain `bound`; None for BASES if `methods` is None,
    else for none. calibration: statistics of the model's inputs; what needs them has no row
    without. fisher: those of `moebound calibrate --fisher`, for `plan:fisher` alone; rows that are
    kept without are taken over. limit: problems of the task. answers: of these, how many are
    answered, all if None: models that are broken answer at length. rows: a folder where rows are
    kept, so that the same call goes on after an interruption. workers: who makes the rows, each
    with a model of its own; None for this process. Paths must mean the same to all; the rows are
    the same, but for what making a store took.

    Raises MethodError for an unknown method, before any work, and what the parts raise.
    """
    checkpoint = open_checkpoint(src)
    if calibration is not None:
        calibration.check_model(experts_name(checkpoint), src)
    if fisher is not None:
        fisher.check_model(experts_name(checkpoint), src)
        fisher.check_fisher()
    place = Place(checkpoint, calibration, fisher)
    asked: dict[str, None] = {}
    planned = () if fisher is None else (FISHER,)
    for name in (*planned, *METHODS) if methods is None else methods:
        try:
            sizing_of(name, place)
        except BackendUnavailable:
            if methods is not None:
                raise
        else:
            asked[name] = None
    compared = COMPARED if removed else ()
    wrong = [value for value in (*bits, *removed) if not value > 0]
    if wrong or any(value >= 100 for value in removed):
        raise MoeboundError(
            f"bits {list(bits)}, removed {list(removed)}: expected numbers above 0, and percents "
            "below 100"
        )
    every: list[Part] = [MethodPart(name, size) for size in dict.fromkeys(bits) for name in asked]
    every += [
        MethodPart(name, place.raw_bits * (1 - share / 100), share)
        for share in dict.fromkeys(removed)
        for name in compared
    ]
    if bases is None:
        bases = BASES if methods is None else ()
    for base in bases:
        get_method(f"residual:{base}")  # an unknown one before any work
    every += [BasePart(base) for base in dict.fromkeys(bases)]
    with tempfile.TemporaryDirectory(prefix="moebound-methods-") as temporary, ExitStack() as stack:
        folder = rows or Path(temporary)
        run_ = _Run(src, task, limit, answers, place, say, len(every), folder / "moved")
        kept = stack.enter_context(KeptRows(folder, run_.identity(), run_.later()))
        return run_.all(every, kept, workers)


class _Run(Beside):
    """One comparison."""

    def __init__(
        self,
        src: str,
        task: Task,
        limit: int | None,
        answers: int | None,
        place: Place,
        say: Say,
        total: int,
        moved: Path,
    ) -> None:
        super().__init__(src, task, limit, say, n_answers=answers)
        self.place, self.total, self.moved = place, total, moved

    def identity(self) -> dict[str, Any]:
        """What rows are of: those of another are not mixed in."""
        return {
            "model": experts_name(self.place.checkpoint),
            "task": self.task.name,
            "limit": self.limit,
            "answers": self.n_answers,
            "calibration": _identity(self.place.calibration),
        }

    def later(self) -> dict[str, Any]:
        """What rows are of, too, that may come to those that are there."""
        fisher = self.place.fisher
        return {} if fisher is None else {"fisher": _identity(fisher)}

    def all(
        self, every: Sequence[Part], kept: KeptRows, workers: Hire | None = None
    ) -> MethodsReport:
        """All rows, those that are kept already and those that are made and kept now."""
        loaded = self.load(kept)
        rows: dict[str, MethodRow | BaseRow] = {}
        for part in every:
            before = kept.get(part.key)
            if before is not None:
                rows[part.key] = part.of_kept(before, self.task.name)
        left = {part.key: part for part in every if part.key not in rows}
        with closing(self._made(loaded, list(left.values()), workers)) as finished:
            for done in finished:
                self.made += 1
                if done.kept is not None:
                    kept.add(done.part.key, done.kept)
                rows[done.part.key] = done.row
                if workers is not None:
                    self._say(f"{done.part.said}: done", len(left))
        found = [rows[part.key] for part in every]
        of, fisher = (
            None if statistics is None else statistics.of.to_json()
            for statistics in (self.place.calibration, self.place.fisher)
        )
        return MethodsReport(
            self.src, self.task.name, self.n_problems, self.answers, lengths(self.baseline),
            tuple(row for row in found if isinstance(row, MethodRow)), describe(), of,
            tuple(row for row in found if isinstance(row, BaseRow)), fisher,
        )  # fmt: skip

    def _made(
        self, loaded: Loaded, left: list[Part], workers: Hire | None
    ) -> Generator[Done, None, None]:
        """Rows, as they are finished. This process says before each what it makes."""
        if workers is None:
            own = Parts(self, loaded, self.place, self.moved)
            for part in left:
                self._say(part.said, len(left))
                yield own.run(part)
        elif left:
            of, fisher = self.place.calibration, self.place.fisher
            # Figures depend on the number of threads, so a worker has as many as this process.
            setup = Opening(parts, {
                "src": self.src, "task": self.task, "limit": self.limit, "answers": self.n_answers,
                "calibration": None if of is None else of.folder,
                "fisher": None if fisher is None else fisher.folder, "moved": self.moved,
                "weights": loaded.source.weights, "at": Path.cwd(),
            }, threads=torch.get_num_threads())  # fmt: skip
            known = {"answers": self.answers, "drafts": self.drafts}
            with workers(setup) as hands:
                self._say(f"{min(hands.count, len(left))} workers", len(left))
                yield from hands.run(left, known)

    def _say(self, what: str, n_left: int) -> None:
        """n_left: rows that were not there when it began."""
        done = self.total - n_left + self.made
        self.say(f"{what}{self.left(done)}", done, self.total)


def _identity(statistics: Statistics | None) -> dict[str, Any] | None:
    """What statistics are of, as far as rows depend on it."""
    if statistics is None:
        return None
    names = ("text_sha256", "moments", "routed", "searched")
    found = {name: getattr(statistics.of, name) for name in names}
    if statistics.of.answer_weight != 1:
        found["answer_weight"] = statistics.of.answer_weight
    return found


def lengths(baseline: Baseline) -> tuple[tuple[int, int], ...]:
    """Of each problem, tokens read, and those of its solution."""
    found = [(0, 0)] * baseline.n_rows
    for rows, batch, _ in baseline.parts:
        whole, answers = batch.predicts.sum(1).tolist(), batch.answers.sum(1).tolist()
        for at, pair in zip(rows.tolist(), zip(whole, answers, strict=True), strict=True):
            found[at] = pair
    return tuple(found)
