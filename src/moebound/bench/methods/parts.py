"""Rows, each made by itself: by this process, or by others (`jobs/workers.py`).

A row is one method at one size, or one base. It needs the model, what the original predicts and
answers, and nothing of other rows. Who makes it keeps nothing: it gives the row away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moebound.bench.beside import Beside
from moebound.bench.methods.again import Again
from moebound.bench.methods.making import Candidate, make
from moebound.bench.methods.place import WITHIN, Place, Sizing
from moebound.bench.methods.residuals import BaseRow, base_row
from moebound.bench.methods.rows import MethodRow
from moebound.bench.methods.sizing import sizing_of
from moebound.checkpoint import open_checkpoint
from moebound.errors import BoundViolatedError, MoeboundError, SizeError
from moebound.evaluate.loading import Loaded
from moebound.files.formats.statistics import read_statistics
from moebound.tasks import Task

_TRIES = 5


@dataclass(frozen=True)
class MethodPart:
    """method: as it is asked for. bits, removed: as of `MethodRow`."""

    method: str
    bits: float
    removed: float | None = None

    @property
    def key(self) -> str:
        """What its row is kept as."""
        share = "" if self.removed is None else f", {self.removed:g} % removed"
        return f"{self.method} at {self.bits:g}{share}"

    @property
    def said(self) -> str:
        return f"{self.method} at {self.bits:g} bits"

    def of_kept(self, data: Mapping[str, Any], task: str) -> MethodRow:
        """Its row. Raises FormatError."""
        return MethodRow.of_kept(data, task)


@dataclass(frozen=True)
class BasePart:
    """What the residual of a base comes to."""

    base: str

    @property
    def key(self) -> str:
        """What its row is kept as."""
        return f"residual of {self.base}"

    @property
    def said(self) -> str:
        return self.key

    def of_kept(self, data: Mapping[str, Any], task: str) -> BaseRow:
        """Its row. Raises FormatError."""
        del task
        return BaseRow.of_kept(data)


Part = MethodPart | BasePart


@dataclass(frozen=True)
class Done:
    """A row. kept: what is kept of it, for `of_kept`; None where the next run tries again."""

    part: Part
    row: MethodRow | BaseRow
    kept: dict[str, Any] | None


class Parts:
    """What makes rows. beside: the original, which was read. moved: the folder of statistics that
    are gathered again."""

    def __init__(self, beside: Beside, loaded: Loaded, place: Place, moved: Path) -> None:
        self._beside, self._loaded, self._place = beside, loaded, place
        of = place.calibration
        self._again = None if of is None else Again(beside.src, of, moved)
        self._sizings: dict[str, Sizing] = {}

    def use(self, known: Mapping[str, Any]) -> None:
        """known: what the original answered, as `Beside` has it."""
        self._beside.answers, self._beside.drafts = known["answers"], known["drafts"]

    def run(self, part: Part) -> Done:
        """Make a row. Where the method cannot be so small, breaks its promise or fails, that is
        what the row says."""
        if isinstance(part, BasePart):
            base = base_row(self._place.checkpoint, part.base, self._place.calibration)
            return Done(part, base, None if base.reason is not None else asdict(base))
        if part.method not in self._sizings:
            self._sizings[part.method] = sizing_of(part.method, self._place)
        head = MethodRow(part.method, part.bits, part.removed)
        try:
            row = self._at_size(head, self._sizings[part.method])
        except SizeError as error:
            row = replace(head, reason=str(error), nearest=error.nearest)
        except BoundViolatedError as error:
            return Done(part, replace(head, reason=str(error), violated=True), None)
        except MoeboundError as error:
            return Done(part, replace(head, reason=str(error)), None)
        return Done(part, row, row.to_kept())

    def _at_size(self, row: MethodRow, sizing: Sizing) -> MethodRow:
        """A store that takes so many bits a weight, measured: what is asked is set right by what
        came of it. Raises SizeError if none of a few does."""
        bits = row.bits
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
                    moved = self._moved(candidate)
                    made = make(candidate, self._beside.src, self._statistics, folder, moved)
                except SizeError as error:
                    if error.nearest is None or abs(error.nearest - asked) > WITHIN * bits:
                        raise
                    asked = error.nearest  # so little is lost in the percent
                    continue
                if abs(made.bits_per_weight - bits) <= WITHIN * bits:
                    return self._measured(replace(row, made=made), folder)
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
    def _statistics(self) -> Path | None:
        return None if self._place.calibration is None else self._place.calibration.folder

    def _moved(self, candidate: Candidate) -> Path | None:
        """Statistics of the model as a candidate leaves it to its coder, where it asks for them.
        Raises MoeboundError without any of the whole model."""
        if not candidate.again:
            return None
        if self._again is None:
            raise MoeboundError(f"{candidate.setting}: needs statistics (--calibration)")
        return self._again.moved(candidate.own, self._loaded)

    def _measured(self, row: MethodRow, folder: Path) -> MethodRow:
        """The model in a folder, beside the original."""
        score, evaluation = self._beside.compare(folder)
        return replace(row, score=score, evaluation=evaluation, kl_sums=score.kl_sums)


def parts(
    src: str,
    task: Task,
    limit: int | None,
    answers: int | None,
    calibration: Path | None,
    fisher: Path | None,
    moved: Path,
    weights: str,
    at: Path,
    threads: int | None,
) -> Parts:
    """A worker's. weights: a digest of those that the process which asked has; MoeboundError where
    src has others here. at: the folder that relative paths are seen from."""
    if threads is not None:
        torch.set_num_threads(threads)
    with suppress(OSError):  # a machine without it finds what is named by whole paths
        os.chdir(at)
    beside = Beside(src, task, limit, lambda *_: None, n_answers=answers)
    loaded = beside.read()
    if loaded.source.weights != weights:
        raise MoeboundError(
            f"{src}: a worker finds other weights there than the process that asked; all machines "
            "must see the same files"
        )
    of, own = (None if path is None else read_statistics(path) for path in (calibration, fisher))
    return Parts(beside, loaded, Place(open_checkpoint(src), of, own), moved)
