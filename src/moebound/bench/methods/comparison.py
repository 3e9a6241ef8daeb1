"""Every method at the same bytes: made, checked, loaded, and compared with the original.

A row is one method at one size, in bits a weight of the routed experts, everything counted, within
a percent. All are real stores, made by a process of their own (`making.py`), verified, loaded as
`from_pretrained` loads them, and compared with the original on the same problems; what is no routed
expert's is bit for bit the original's in all of them. What a method cannot come to is a row, too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moebound.bench.beside import Beside, Say
from moebound.bench.environment import describe
from moebound.bench.kept import KeptRows
from moebound.bench.methods.again import Again
from moebound.bench.methods.making import Candidate, make
from moebound.bench.methods.residuals import BaseRow, base_row
from moebound.bench.methods.rows import MethodRow, MethodsReport
from moebound.bench.methods.sizing import AGAIN, WITHIN, Place, Sizing, sizing_of
from moebound.checkpoint import experts_name, open_checkpoint
from moebound.errors import BackendUnavailable, BoundViolatedError, MoeboundError, SizeError
from moebound.evaluate.fidelity import Baseline
from moebound.files.formats.statistics import Statistics
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
"""What is measured if nobody says: all there are, as they are published and in fewer bits."""

_TRIES = 5


def run(
    src: str,
    task: Task,
    *,
    methods: Sequence[str] | None = None,
    bits: Sequence[float] = BITS,
    removed: Sequence[float] = (),
    bases: Sequence[str] | None = None,
    calibration: Statistics | None = None,
    limit: int | None = None,
    answers: int | None = None,
    rows: Path | None = None,
    say: Say = lambda what, done, total: None,
) -> MethodsReport:
    """Measure every method at every size.

    methods: as `sizing.py` knows them; None for METHODS, without those whose library is not
    installed. removed: percents of the experts' bytes, at which COMPARED are measured, too.
    bases: whose residuals are compared with plain `bound`; None for BASES if `methods` is None,
    else for none. calibration: statistics of the model's inputs; what needs them has no row
    without. limit: problems of the task. answers: of these, how many are answered, all if None:
    models that are broken answer at length. rows: a folder where rows are kept, so that the same
    call goes on after an interruption.

    Raises MethodError for an unknown method, before any work, and what the parts raise.
    """
    checkpoint = open_checkpoint(src)
    if calibration is not None:
        calibration.check_model(experts_name(checkpoint), src)
    place = Place(checkpoint, calibration)
    asked: dict[str, Sizing] = {}
    for name in METHODS if methods is None else methods:
        try:
            asked[name] = sizing_of(name, place)
        except BackendUnavailable:
            if methods is not None:
                raise
    compared = {name: sizing_of(name, place) for name in COMPARED} if removed else {}
    wrong = [value for value in (*bits, *removed) if not value > 0]
    if wrong or any(value >= 100 for value in removed):
        raise MoeboundError(
            f"bits {list(bits)}, removed {list(removed)}: expected numbers above 0, and percents "
            "below 100"
        )
    cells: list[tuple[str, Sizing, float, float | None]] = [
        (name, sizing, size, None) for size in dict.fromkeys(bits) for name, sizing in asked.items()
    ]
    cells += [
        (name, sizing, place.raw_bits * (1 - share / 100), share)
        for share in dict.fromkeys(removed)
        for name, sizing in compared.items()
    ]
    if bases is None:
        bases = BASES if methods is None else ()
    for base in bases:
        get_method(f"residual:{base}")  # an unknown one before any work
    total = len(cells) + len(bases)
    with tempfile.TemporaryDirectory(prefix="moebound-methods-") as temporary, ExitStack() as stack:
        folder = rows or Path(temporary)
        run_ = _Run(src, task, limit, answers, place, say, total, folder / "moved")
        kept = stack.enter_context(KeptRows(folder, run_.identity()))
        return run_.all(cells, bases, kept)


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
        self.place, self.total = place, total
        of = place.calibration
        self.again = None if of is None else Again(src, of, moved)

    def identity(self) -> dict[str, Any]:
        """What rows are of: those of another are not mixed in."""
        of = None if self.place.calibration is None else self.place.calibration.of
        return {
            "model": experts_name(self.place.checkpoint),
            "task": self.task.name,
            "limit": self.limit,
            "answers": self.n_answers,
            "calibration": of and {"text_sha256": of.text_sha256, "moments": of.moments,
                                   "routed": of.routed, "searched": of.searched},
        }  # fmt: skip

    def all(
        self,
        cells: Sequence[tuple[str, Sizing, float, float | None]],
        bases: Sequence[str],
        kept: KeptRows,
    ) -> MethodsReport:
        self.loaded = self.load(kept)
        found = []
        for done, (method, sizing, bits, removed) in enumerate(cells):
            self.say(f"{method} at {bits:g} bits{self.left(done)}", done, self.total)
            found.append(self.row(kept, method, sizing, bits, removed))
        measured = []
        for done, base in enumerate(bases, len(cells)):
            self.say(f"residual of {base}{self.left(done)}", done, self.total)
            measured.append(self.base(kept, base))
        of = None if self.place.calibration is None else self.place.calibration.of.to_json()
        return MethodsReport(
            self.src, self.task.name, self.n_problems, self.answers, lengths(self.baseline),
            tuple(found), describe(), of, tuple(measured),
        )  # fmt: skip

    def base(self, kept: KeptRows, base: str) -> BaseRow:
        """What a base's residual comes to, kept already, or measured and kept."""
        key = f"residual of {base}"
        before = kept.get(key)
        if before is not None:
            return BaseRow.of_kept(before)
        row = base_row(self.place.checkpoint, base, self.place.calibration)
        self.made += 1
        if row.reason is None:
            kept.add(key, asdict(row))
        return row

    def row(
        self, kept: KeptRows, method: str, sizing: Sizing, bits: float, removed: float | None
    ) -> MethodRow:
        """A row that is kept already, or made and kept."""
        key = f"{method} at {bits:g}" + ("" if removed is None else f", {removed:g} % removed")
        before = kept.get(key)
        if before is not None:
            return MethodRow.of_kept(before, self.task.name)
        try:
            row = self.at_size(method, sizing, bits, removed)
        except SizeError as error:
            row = MethodRow(method, bits, removed, reason=str(error), nearest=error.nearest)
        except BoundViolatedError as error:
            return MethodRow(method, bits, removed, reason=str(error), violated=True)
        except MoeboundError as error:  # the next run tries again
            return MethodRow(method, bits, removed, reason=str(error))
        finally:
            self.made += 1
        kept.add(key, row.to_kept())
        return row

    def at_size(self, method: str, sizing: Sizing, bits: float, removed: float | None) -> MethodRow:
        """A store that takes so many bits a weight, measured: what is asked is set right by what
        came of it. Raises SizeError if none of a few does."""
        search, asked = sizing.search(bits), bits
        near: list[float] = []
        tried: set[Candidate] = set()
        with tempfile.TemporaryDirectory(prefix="moebound-methods-") as temporary:
            for number in range(_TRIES):
                candidate = search(asked)
                if candidate in tried:
                    break
                tried.add(candidate)
                folder = Path(temporary) / f"store{number}"
                try:
                    moved = self.moved(candidate)
                    made = make(candidate, self.src, self.statistics, folder, moved)
                except SizeError as error:
                    if error.nearest is None or abs(error.nearest - asked) > WITHIN * bits:
                        raise
                    asked = error.nearest  # so little is lost in the percent
                    continue
                if abs(made.bits_per_weight - bits) <= WITHIN * bits:
                    return self.measured(MethodRow(method, bits, removed, made), folder)
                shutil.rmtree(folder, ignore_errors=True)
                near.append(made.bits_per_weight)
                asked += bits - made.bits_per_weight
        if not near:
            raise SizeError(f"{bits:g} bits a weight: nothing near it could be made")
        nearest = min(near, key=lambda size: abs(size - bits))
        raise SizeError(
            f"{bits:g} bits a weight: expected within {WITHIN:.0%}; the nearest that was made is "
            f"{nearest:.4g} bits",
            nearest,
        )

    @property
    def statistics(self) -> Path | None:
        return None if self.place.calibration is None else self.place.calibration.folder

    def moved(self, candidate: Candidate) -> Path | None:
        """Statistics of the model as a candidate leaves it to its coder, where it asks for them.
        Raises MoeboundError without any of the whole model."""
        if not candidate.again:
            return None
        if self.again is None:
            raise MoeboundError(f"{candidate.setting}: needs statistics (--calibration)")
        return self.again.moved(candidate.own, self.loaded)

    def measured(self, row: MethodRow, folder: Path) -> MethodRow:
        """The model in a folder, beside the original."""
        score, evaluation = self.compare(folder)
        return replace(row, score=score, evaluation=evaluation, kl_sums=score.kl_sums)


def lengths(baseline: Baseline) -> tuple[tuple[int, int], ...]:
    """Of each problem, tokens read, and those of its solution."""
    found = [(0, 0)] * baseline.n_rows
    for rows, batch, _ in baseline.parts:
        whole, answers = batch.predicts.sum(1).tolist(), batch.answers.sum(1).tolist()
        for at, pair in zip(rows.tolist(), zip(whole, answers, strict=True), strict=True):
            found[at] = pair
    return tuple(found)
