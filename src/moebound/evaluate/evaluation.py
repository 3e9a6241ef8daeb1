"""What a model's answers to a task come to: counts, ICA, PIA, and where neither means anything.

"/" is what the paper's tables have where "the model no longer outputs or enters a down state"
(2509.07727, table 7). Here: fewer than DOWN_SHARE of the outputs are valid. An output is valid if
it ended by itself, before the limit on its length, and gives an answer, right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moebound.evaluate.answering import Output
from moebound.evaluate.statistics import Interval, Paired, paired, wilson
from moebound.tasks.base import Problem, Task, Verdict

DOWN_SHARE = 0.1
"""With fewer valid outputs than this share, a condition is down."""


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


@dataclass(frozen=True)
class Tally:
    """Counts of a set of answers. unfinished: cut off at the limit."""

    n: int
    ica: int
    pia: int
    valid: int
    unfinished: int

    @classmethod
    def of(cls, rows: Sequence[Scored]) -> Tally:
        return cls(
            len(rows),
            sum(row.ica for row in rows),
            sum(row.pia for row in rows),
            sum(row.valid for row in rows),
            sum(not row.finished for row in rows),
        )

    @property
    def ica_share(self) -> Interval:
        return wilson(self.ica, self.n)

    @property
    def pia_share(self) -> Interval:
        return wilson(self.pia, self.n)

    @property
    def down(self) -> bool:
        """The paper's "/"."""
        return self.n > 0 and self.valid < DOWN_SHARE * self.n

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "down": self.down,
            "ica_share": self.ica_share.to_json(),
            "pia_share": self.pia_share.to_json(),
        }


@dataclass(frozen=True)
class Evaluation:
    """A model on a task. source: what was loaded. rows: an answer each, in the task's order."""

    source: dict[str, Any]
    task: str
    rows: tuple[Scored, ...]

    @property
    def total(self) -> Tally:
        return Tally.of(self.rows)

    @property
    def by_format(self) -> dict[str, Tally]:
        """Of each answer format that is asked for, by name."""
        names = sorted({row.format for row in self.rows})
        return {name: Tally.of([row for row in self.rows if row.format == name]) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Everything but the single answers."""
        return {
            "source": self.source,
            "task": self.task,
            "total": self.total.to_json(),
            "by_format": {name: tally.to_json() for name, tally in self.by_format.items()},
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
