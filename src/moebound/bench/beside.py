"""Models in folders beside the original: read and asked the same, and how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from moebound.bench.kept import KeptRows
from moebound.evaluate.candidate import Original, in_folder, score
from moebound.evaluate.evaluation import Evaluation, with_answers
from moebound.evaluate.fidelity import Baseline
from moebound.evaluate.loading import Loaded, load
from moebound.evaluate.scoring import evaluate
from moebound.evaluate.text import solved_rows
from moebound.evaluate.transcript import read_transcript
from moebound.score import Score
from moebound.tasks import Task

Say = Callable[[str, int, int], None]
"""Called with what is being measured, rows done, and rows in all."""

ANSWERS_EVERY_S = 10.0
"""How often it is said how many problems the original has answered."""


class Beside:
    """The original of a comparison. made: rows that were measured, and not kept from before. total:
    rows in all.

    limit: problems of the task. n_answers: of these, how many are answered; all if None.
    """

    def __init__(
        self, src: str, task: Task, limit: int | None, say: Say, *, n_answers: int | None = None
    ) -> None:
        self.src, self.task, self.limit, self.say = src, task, limit, say
        self.n_answers = n_answers
        self.made = self.total = 0
        self.began = self._said = 0.0

    def read(self) -> Loaded:
        """The original, which reads the problems now."""
        loaded = load(self.src)
        problems = self.task.problems(self.limit)
        self.n_problems = len(problems)
        self.asked = self.limit if self.n_answers is None else min(self.n_answers, len(problems))
        rows = solved_rows(loaded.tokenizer, self.task, problems)
        self.baseline = Baseline.of(loaded.model, rows)
        self.original = Original(loaded.model, self.baseline)
        return loaded

    def load(self, kept: KeptRows) -> Loaded:
        """The original, which reads and answers now; the answers are kept beside the rows."""
        self.say("the original is loaded, and reads the task", 0, self.total)
        loaded = self.read()
        self.answers = evaluate(
            loaded, self.task, limit=self.asked, answers=kept.answers, progress=self._answered
        )
        self.drafts: Mapping[str, str] = read_transcript(kept.answers).texts
        self.began = time.monotonic()
        return loaded

    def _answered(self, n: int, of: int) -> None:
        if time.monotonic() - self._said >= ANSWERS_EVERY_S:
            self._said = time.monotonic()
            self.say(f"the original answers, {n} of {of} problems so far", 0, self.total)

    def compare(self, folder: Path) -> tuple[Score, Evaluation]:
        """The model in a folder."""
        found = score(
            in_folder(folder),
            self.original,
            ask=lambda one: evaluate(one, self.task, limit=self.asked, drafts=self.drafts),
        )
        return with_answers(found.score, self.answers, found.asked), found.asked

    def left(self, done: int) -> str:
        """How long the rest takes, by the rows that were made so far."""
        if not self.made:
            return ""
        seconds = (time.monotonic() - self.began) / self.made * (self.total - done)
        return f"; {seconds / 60:.0f} min left" if seconds >= 100 else f"; {seconds:.0f} s left"
