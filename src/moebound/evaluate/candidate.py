"""From a candidate to its score: the one way in which a changed model is measured.

    original = Original(model, Baseline.of(model, rows))
    score(planned(live, plan), original).score               # experts changed in place
    score(in_folder("a/store"), original).score              # a checkpoint or a store, loaded

A candidate is a context manager: for as long as its `with` lasts, the original model is changed, or
there is another one, which it then yields as `Loaded`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from moebound.checkpoint import Checkpoint
from moebound.evaluate.loading import Loaded, load
from moebound.plan import Plan
from moebound.score import Score
from moebound.store import CompressSummary, VerifyReport, compress, verify
from moebound.types import ErrorBound

E = TypeVar("E")


class Text(Protocol):
    """What the original predicts on some text; see `fidelity.Baseline`."""

    def compare(self, model: Any) -> Score: ...


@dataclass(frozen=True, eq=False)
class Original:
    """A model, and what it predicts while nothing is changed."""

    model: Any
    text: Text


@dataclass(frozen=True)
class Result(Generic[E]):
    """entered: what the candidate's `with` gave. asked: what `ask` gave."""

    score: Score
    entered: E
    asked: Any


def score(
    candidate: AbstractContextManager[E],
    original: Original,
    *,
    ask: Callable[[E], Any] = lambda _: None,
) -> Result[E]:
    """Read the original's text with a candidate. ask: what else to do meanwhile, such as let the
    model answer problems; called with what the candidate yields. The original is as it was
    afterwards."""
    with candidate as entered:
        asked = ask(entered)
        model = entered.model if isinstance(entered, Loaded) else original.model
        return Result(original.text.compare(model), entered, asked)


@contextmanager
def in_folder(path: str | os.PathLike[str]) -> Iterator[Loaded]:
    """The model of a checkpoint or store. Raises as `load`."""
    yield load(path)


@dataclass(frozen=True)
class Stored:
    """A store on disk that was checked against the checkpoint it is made from."""

    path: Path
    summary: CompressSummary
    checked: VerifyReport


def stored(
    checkpoint: Checkpoint, path: Path, bound: ErrorBound | Plan | None, **options: Any
) -> Stored:
    """Write a store and verify it. options: further ones of `compress`, as which it raises; other
    tensors are kept as they are, since experts are what is compared. A bound that does not hold is
    in `checked`."""
    summary = compress(checkpoint, path, bound=bound, **{"others": "keep", **options})
    return Stored(path, summary, verify(path, against=checkpoint, jobs=options.get("jobs")))
