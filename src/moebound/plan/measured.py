"""What a plan loses, measured, to stand beside what was predicted.

Predictions of plans are too low. Of many experts a planner widens those whose losses are taken for
too small (the optimizer's curse), the text it plans with is no other text, and what many errors do
together is not their sum. To measure a plan takes a pass over some text. What measures is given as
a function, so that this folder loads no model; `sensitivity/trial.py` has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moebound.errors import FormatError, PlanError
from moebound.files.documents import count, number
from moebound.score import Score, Tokens
from moebound.score.record import finite, tokens_of


@dataclass(frozen=True)
class Measured:
    """The score of the model with all experts changed as planned. task: the text, which nothing
    that the plan is made from has read. n_tried: plans measured on these problems until this one
    was taken. tokens: which of the text's count.
    """

    score: Score
    task: str
    n_tried: int = 1
    tokens: Tokens = "answers"

    @classmethod
    def of(
        cls,
        kl: float,
        stderr: float,
        task: str,
        n_problems: int,
        *,
        exact: bool = True,
        n_tried: int = 1,
        tokens: Tokens = "answers",
    ) -> Measured:
        """Where no more than a KL is known. tokens: of which."""
        if tokens == "all":
            known = Score(kl_nats=kl, kl_stderr=stderr)
        else:
            known = Score(answer_kl_nats=kl, answer_kl_stderr=stderr)
        return cls(replace(known, n_problems=n_problems, exact=exact), task, n_tried, tokens)

    @property
    def kl(self) -> float:
        """Nats a token: what plans keep a limit of."""
        return self.score.kl(self.tokens)[0]

    @property
    def stderr(self) -> float:
        return self.score.kl(self.tokens)[1]

    @property
    def n_problems(self) -> int:
        return self.score.n_problems or 0

    def after(self, n_tried: int) -> Measured:
        return replace(self, n_tried=n_tried)

    def to_json(self) -> dict[str, Any]:
        """Plans of before "score" have the figures in front of it, and keep their bytes."""
        score = self.score.to_json()
        alone = Measured.of(0.0, 0.0, "", 0, tokens=self.tokens).score.to_json().keys()
        return {
            "kl": finite(self.kl),
            "stderr": finite(self.stderr),
            "tokens": self.tokens,
            "task": self.task,
            "n_problems": self.n_problems,
            "exact": self.score.exact,
            "n_tried": self.n_tried,
            **({"score": score} if score.keys() > alone else {}),
        }

    @classmethod
    def from_json(cls, data: Any) -> Measured:
        """Raises PlanError, FormatError."""
        if not isinstance(data, Mapping):
            raise PlanError(f"measured: expected an object, found {str(data)[:40]!r}")
        kl, stderr = data.get("kl"), data.get("stderr")
        alone = cls.of(
            math.inf if kl is None else number(kl, "measured: kl"),
            math.nan if stderr is None else number(stderr, "measured: stderr"),
            str(data.get("task", "")),
            count(data.get("n_problems"), "measured: n_problems"),
            exact=bool(data.get("exact", True)),
            n_tried=count(data.get("n_tried", 1), "measured: n_tried"),
            tokens=tokens_of(data.get("tokens", "answers")),
        )
        if "score" not in data:
            return alone
        try:
            return replace(alone, score=Score.from_json(data["score"]))
        except FormatError as error:
            raise PlanError(f"measured: score: {error}") from error
