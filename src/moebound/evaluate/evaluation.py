"""What a model's answers to a task come to: counts, ICA, PIA, and where neither means anything.

"/" is what the paper's tables have where "the model no longer outputs or enters a down state"
(2509.07727, table 7). Here: fewer than DOWN_SHARE of the outputs are valid. An output is valid if
it ended by itself, before the limit on its length, and gives an answer, right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moebound.evaluate.answering import Output
from moebound.score import Score, Tally
from moebound.score.statistics import Paired, paired
from moebound.tasks.base import Problem, Task, Verdict


@dataclass(frozen=True)
class Scored:
    """One answer and what it is worth. valid: it ended by itself and gives an answer."""

    id: str
    format: str
    ica: bool
    pia: bool
    valid: bool
    finished: bool
    n_tokens: int
    extracted: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def score(task: Task, problem: Problem, output: Output) -> Scored:
    """Judge one answer."""
    verdict: Verdict = task.judge(problem, output.text)
    return Scored(
        problem.id,
        problem.format,
        verdict.ica,
        verdict.pia,
        verdict.valid and output.finished,
        output.finished,
        output.n_tokens,
        verdict.extracted,
    )


def tally(rows: Sequence[Scored]) -> Tally:
    """Counts of these answers."""
    return Tally(
        len(rows),
        sum(row.ica for row in rows),
        sum(row.pia for row in rows),
        sum(row.valid for row in rows),
        sum(not row.finished for row in rows),
    )


@dataclass(frozen=True)
class Evaluation:
    """A model on a task. source: what was loaded. rows: an answer each, in the task's order."""

    source: dict[str, Any]
    task: str
    rows: tuple[Scored, ...]

    @property
    def total(self) -> Tally:
        return tally(self.rows)

    @property
    def by_format(self) -> dict[str, Tally]:
        """Of each answer format that is asked for, by name."""
        names = sorted({row.format for row in self.rows})
        return {name: tally([row for row in self.rows if row.format == name]) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Everything but the single answers."""
        return {
            "source": self.source,
            "task": self.task,
            "total": self.total.to_json(),
            "by_format": {name: counts.to_json() for name, counts in self.by_format.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Two models on the problems that both answered: ICA and PIA, in pairs."""

    ica: Paired
    pia: Paired

    def to_json(self) -> dict[str, Any]:
        return {"ica": self.ica.to_json(), "pia": self.pia.to_json()}


def compare_to(baseline: Evaluation, found: Evaluation) -> Comparison:
    """The difference that `found` makes. Raises ValueError where no problem is in both."""
    before = {row.id: row for row in baseline.rows}
    pairs = [(before[row.id], row) for row in found.rows if row.id in before]
    return Comparison(
        paired([b.ica for b, _ in pairs], [a.ica for _, a in pairs]),
        paired([b.pia for b, _ in pairs], [a.pia for _, a in pairs]),
    )


def with_answers(score: Score, baseline: Evaluation, found: Evaluation) -> Score:
    """A score with what the model answered, beside what the original did."""
    pairs = compare_to(baseline, found).pia
    return replace(score, tally=found.total, lost=pairs.lost, gained=pairs.gained)
