"""What a study measures: conditions, made from a suite's entries for the model at hand.

An entry names places by relative depth (`layer:@0.48`), many sources, many rates. On a model with
26 MoE layers `@0.48` is the 13th of them; on another model it is the one at the same depth. What
comes out are conditions: one set of experts, one source, one rate, one seed, one task, with an id
that is the same every time and names all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from moebound.codec import codec_ids, get_codec
from moebound.errors import MoeboundError
from moebound.files.formats.study import BASELINE, EXTRA, Condition, Share
from moebound.sensitivity.noise import CODEC_PREFIX, parse_source, source_ids
from moebound.sensitivity.selectors import parse_selector
from moebound.types import BoundScope, ExpertKey

TABLES = ("3.2.1", "3", "4", "5", "6", "7", "8", "9", EXTRA)
"""Of the paper (MoE-Compression, 2509.07727), named by section or number; and what is not in it."""


@dataclass(frozen=True)
class ModelFacts:
    """What a suite has to know of a model. layers: decoder indices of its MoE layers, ascending.
    n_experts: of the first of them. top_k: experts chosen a token. fingerprint: of its weights."""

    name: str
    fingerprint: str
    layers: tuple[int, ...]
    n_experts: int
    top_k: int

    def at(self, depth: float) -> int:
        """The MoE layer at a relative depth: 0 is the first, 1 the last."""
        return self.layers[math.floor(depth * (len(self.layers) - 1) + 0.5)]


def baseline(task: str) -> Condition:
    """The model as it is, on one task."""
    label = "no error"
    return Condition(f"{task}/baseline", EXTRA, label, "", BASELINE, None, "expert", 0, task)


@dataclass(frozen=True)
class Entry:
    """A line of a suite: all its sources x rates x seeds x tasks are conditions.

    selector, label: may have depths, `@0.48`. sources: None for those of the study; else these, as
    far as the study has them. rates: each bound; sources without one count once. n_seeds: None for
    the study's. task: 0 the study's first, 1 its second; None for each; or a name. answers: whether
    problems are answered; n_answered: with how many of the seeds, None for all: the others are
    read only. paper: by rate. where: how messages call it.
    """

    table: str
    label: str
    selector: str
    rates: tuple[float, ...]
    sources: tuple[str, ...] | None = None
    n_seeds: int | None = None
    task: int | str | None = 0
    answers: bool = True
    n_answered: int | None = None
    paper: Mapping[float, tuple[Share, Share]] | None = None
    bound_scope: BoundScope = "expert"
    where: str = ""


@dataclass(frozen=True)
class Suite:
    """name: for records. entries: made for a model. sources, n_seeds, n_problems: unless asked
    otherwise. n_read: problems that are read, with a solution, to compare predictions."""

    name: str
    entries: Callable[[ModelFacts], Sequence[Entry]]
    sources: tuple[str, ...]
    n_seeds: int
    n_problems: int
    n_read: int

    def conditions(
        self,
        facts: ModelFacts,
        tasks: Sequence[str],
        *,
        sources: Sequence[str] | None = None,
        n_seeds: int | None = None,
    ) -> list[Condition]:
        """All of them, the most telling first: a study that is stopped has a bit of everything.

        Baselines, then conditions that only read (they are quick), then seed by seed, source by
        source. Raises MoeboundError for a place that the model does not have.
        """
        chosen = tuple(sources or self.sources)
        seeds = self.n_seeds if n_seeds is None else n_seeds
        found: dict[str, Condition] = {}
        for entry in self.entries(facts):
            for condition in _expand(entry, facts, tasks, chosen, seeds):
                found.setdefault(condition.id, condition)

        def turn(condition: Condition) -> tuple[Any, ...]:
            rank = chosen.index(condition.source) if condition.source in chosen else len(chosen)
            return condition.answers, condition.seed, rank, tasks.index(condition.task)

        return [baseline(task) for task in tasks] + sorted(found.values(), key=turn)


def _expand(
    entry: Entry,
    facts: ModelFacts,
    tasks: Sequence[str],
    chosen: tuple[str, ...],
    n_seeds: int,
) -> list[Condition]:
    selector = str(parse_selector(with_layers(entry.selector, facts)))
    label = with_layers(entry.label, facts)
    check_selector(selector, facts)
    sources = [s for s in entry.sources or chosen if s in chosen]
    made = []
    for task in _tasks(entry, tasks):
        for text in sources:
            source = parse_source(text)
            for rate in entry.rates if source.needs_bound else (None,):
                count = (entry.n_seeds or n_seeds) if source.seeded else 1
                for seed in range(count):
                    answers = entry.answers and (
                        entry.n_answered is None or seed < entry.n_answered
                    )
                    made.append(
                        named(
                            Condition(
                                "", entry.table, label, selector, text, rate, entry.bound_scope,
                                seed, task, answers, (entry.paper or {}).get(rate or 0.0),
                            )
                        )
                    )  # fmt: skip
    return made


def named(condition: Condition) -> Condition:
    """With the id that follows from the rest."""
    rate = "-" if condition.rate is None else f"{condition.rate:g}"
    scope = "" if condition.bound_scope == "expert" else f" per {condition.bound_scope}"
    only = "" if condition.answers else "/kl"
    parts = (condition.task, condition.table, condition.selector, condition.source)
    return replace(condition, id=f"{'/'.join(parts)}/{rate}{scope}/{condition.seed}{only}")


def _tasks(entry: Entry, tasks: Sequence[str]) -> Sequence[str]:
    if entry.task is None:
        return tasks
    if isinstance(entry.task, str):
        if entry.task not in tasks:
            raise MoeboundError(
                f"{entry.where}task: {entry.task!r} is not among the study's: {', '.join(tasks)}"
            )
        return [entry.task]
    return tasks[entry.task : entry.task + 1]


_DEPTH = re.compile(r"@(\d+(?:\.\d+)?)")


def with_layers(text: str, facts: ModelFacts) -> str:
    """`layer:@0.5` -> `layer:14`. Raises MoeboundError for a depth beyond 1."""

    def layer(found: re.Match[str]) -> str:
        depth = float(found[1])
        if depth > 1:
            raise MoeboundError(f"{text!r}: depth @{found[1]}: expected 0 (first) to 1 (last)")
        return str(facts.at(depth))

    return _DEPTH.sub(layer, text)


class _InOrder:
    """Stands for a profile where only the existence of experts is asked."""

    def __init__(self, n_experts: int) -> None:
        self._ranking = range(n_experts)

    def ranking(self, layer: int) -> Sequence[int]:
        return self._ranking


def check_selector(selector: str, facts: ModelFacts) -> None:
    """Raises MoeboundError where it names layers or experts that the model does not have."""
    parse_selector(selector).resolve(_experts(facts), _InOrder(facts.n_experts))


@lru_cache(maxsize=2)
def _experts(facts: ModelFacts) -> tuple[ExpertKey, ...]:
    return tuple(ExpertKey(layer, e) for layer in facts.layers for e in range(facts.n_experts))


def whole_layer(selector: str) -> int | None:
    """The decoder index of a condition that changes all experts of one layer, else None."""
    found = re.fullmatch(r"layer:(\d+)", selector)
    return int(found[1]) if found else None


def all_sources() -> tuple[str, ...]:
    """Every source that changes weights: the simulated ones, and every lossy codec there is."""
    lossy = {CODEC_PREFIX + name for name in codec_ids() if get_codec(name).lossy}
    return tuple(s for s in source_ids() if not s.startswith(CODEC_PREFIX) or s in lossy)
