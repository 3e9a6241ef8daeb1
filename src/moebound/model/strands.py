"""Several forward passes of one model side by side, in one thread.

A strand is a call that runs by itself until it meets the others: at a linear layer, at a layer's
experts. There it leaves what it wants computed and stops; when all strands have stopped, what waits
at one place is computed for all of them at once, and each goes on with its own result. So the
model's code stays as it is, each sequence has its own keys, values and states, whatever they are,
and weights are read, fetched and decoded once for all who wait for them.

    strands = Strands()
    begun = [strands.start(call) for call in calls]     # each runs until it rests, or has ended
    while any(not strand.dead for strand in begun):
        strands.advance([strand for strand in begun if not strand.dead])

Strands are greenlets: stopping one and going on with another takes a microsecond, nothing runs in
parallel, and all of torch's work comes from one thread with one pool of threads. They belong to the
thread that started them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import error, getcurrent, greenlet

Serve = Callable[[list[Any]], Sequence[Any]]
"""Called with what strands have left at one place, in their order; returns a result for each."""


@dataclass(frozen=True)
class _Wait:
    place: object
    item: Any
    serve: Serve
    patient: bool


@dataclass(frozen=True)
class _Failed:
    error: Exception


class Strand(greenlet):  # type: ignore[misc]  # greenlet has no types
    """One call on its way. joins: whether it meets others; where not, it computes all by itself.
    error: what its call has raised. round: a mark that those have who were advanced together.
    together: how many they were."""

    def __init__(self, call: Callable[[], object], *, joins: bool) -> None:
        super().__init__(self._call)
        self.joins = joins
        self.error: Exception | None = None
        self.round: object = None
        self.together = 0
        self.wait: _Wait | None = None
        self._work = call

    def meet(self, place: object, item: Any, serve: Serve, *, patient: bool = False) -> Any:
        """Stop until this is computed, together with what others leave at the same place. Only from
        within. patient: what waits is computed when everything else is, so that all come.

        Raises what computing it has raised: it is tried again for each alone, so that nobody has
        the error of another.
        """
        self.wait = _Wait(place, item, serve, patient)
        found = self._stop()
        if isinstance(found, _Failed):
            raise found.error
        return found

    def rest(self) -> None:
        """Stop until somebody advances it. Only from within."""
        self.wait = None
        self._stop()

    def _stop(self) -> Any:
        parent = self.parent
        assert parent is not None  # of a strand that runs
        return parent.switch()

    def go_on(self, found: Any = None) -> None:
        """Until it meets, rests or ends."""
        self.wait = None
        self.switch(found) if self else self.switch()

    def end(self) -> None:
        """Unwind it where it stands; nothing is computed any more. In another thread than its own,
        nothing happens: it is left to Python."""
        with contextlib.suppress(error):
            self.throw()

    def _call(self) -> None:
        try:
            self._work()
        except Exception as failed:
            self.error = failed


def current() -> Strand | None:
    """The strand that calls this; None outside of any."""
    found = getcurrent()
    return found if isinstance(found, Strand) else None


@dataclass(frozen=True)
class Rows:
    """Texts whose tokens are the rows of one forward pass (`text/one_pass.py`). owners: their
    strands. caches: what each of them remembers. trial: whether the pass is tried out, and
    forgotten."""

    owners: tuple[Strand, ...]
    caches: tuple[Any, ...]
    trial: bool


class _Passing(threading.local):
    rows: Rows | None = None


_passing = _Passing()


def rows() -> Rows | None:
    """Of the pass that calls this; None in a pass of one text, and within a strand, which has one
    row."""
    return None if current() is not None else _passing.rows


@contextlib.contextmanager
def passing(some: Rows | None) -> Iterator[None]:
    """These are the rows meanwhile, in this thread; None: rows that come are no texts."""
    before, _passing.rows = _passing.rows, some
    try:
        yield
    finally:
        _passing.rows = before


class Strands:
    """joins: whether those that are started here meet others."""

    def __init__(self, *, joins: bool = True) -> None:
        self._joins = joins

    def start(self, call: Callable[[], object]) -> Strand:
        """A new one, which has not begun yet."""
        return Strand(call, joins=self._joins)

    def advance(self, strands: Sequence[Strand]) -> None:
        """Each of them goes on, until all rest or have ended. Errors stay with their strands.

        Without gradients: a strand that switches them off and on again does so for all.
        """
        now = object()
        with torch.no_grad():
            for strand in strands:
                strand.round, strand.together = now, len(strands)
            for strand in strands:
                strand.go_on()
            while waiting := [strand for strand in strands if strand.wait is not None]:
                self._serve(waiting)

    @staticmethod
    def _serve(waiting: Sequence[Strand]) -> None:
        """Those at the place of the first who may be served now."""
        waits = {strand: strand.wait for strand in waiting if strand.wait is not None}
        hasty = [wait for wait in waits.values() if not wait.patient]
        chosen = (hasty or list(waits.values()))[0]
        some = [strand for strand, wait in waits.items() if wait.place is chosen.place]
        items = [waits[strand].item for strand in some]
        found: Sequence[Any]
        try:
            found = chosen.serve(items)
        except Exception as failed:
            found = (
                [_Failed(failed)]
                if len(some) == 1
                else [_alone(chosen.serve, item) for item in items]
            )
        for strand, result in zip(some, found, strict=True):
            strand.go_on(result)


def _alone(serve: Serve, item: Any) -> Any:
    try:
        return serve([item])[0]
    except Exception as failed:
        return _Failed(failed)
