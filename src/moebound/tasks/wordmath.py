"""The built-in word problems as tasks: `wordmath`, and `wordmath-hard` with more steps and digits.

Held out from the training of builtin:wordmath; a quarter asks for each of four answer formats.
"""

from __future__ import annotations

from functools import lru_cache

from moebound.tasks.base import Problem, Task, Verdict
from moebound.wordmath.formats import judge
from moebound.wordmath.problems import Level, test_problems

DEFAULT_PROBLEMS = 1000
MAX_NEW_TOKENS: dict[Level, int] = {"wordmath": 64, "wordmath-hard": 112}
"""The longest reference solutions have 35 and 87 tokens."""


class WordMath(Task):
    """The test problems of one level, the first DEFAULT_PROBLEMS unless asked otherwise."""

    def __init__(self, level: Level) -> None:
        self.name = self.level = level
        self.max_new_tokens = MAX_NEW_TOKENS[level]

    def problems(self, limit: int | None = None) -> list[Problem]:
        return list(_problems(self.level, DEFAULT_PROBLEMS if limit is None else limit))

    def judge(self, problem: Problem, text: str) -> Verdict:
        return Verdict(*judge(problem.answer, problem.format, text))


@lru_cache(maxsize=8)
def _problems(level: Level, limit: int) -> tuple[Problem, ...]:
    return tuple(
        Problem(found.id, found.prompt, found.answer, found.reference, found.format)
        for found in test_problems(level, limit)
    )
