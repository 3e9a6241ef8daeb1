"""MATH: competition problems (Hendrycks et al. 2021), the paper's harder task.

Never part of this package: its licence is in dispute. It is read from a file or folder of the
user's own, else MATH-500 is fetched from the hub.
"""

from __future__ import annotations

from pathlib import Path

from moebound.errors import TaskError
from moebound.extras import check
from moebound.tasks.answers import boxed, last_boxed
from moebound.tasks.base import Problem, Task, Verdict
from moebound.tasks.equivalence import same
from moebound.tasks.gsm8k import REQUEST
from moebound.tasks.rows import field, find_data, read_rows

HUB = ("HuggingFaceH4/MATH-500", "test.jsonl")


class Math(Task):
    """data: a file with the problems (fields problem and solution, or answer), a folder in MATH's
    own layout, or None to look for it."""

    name = "math"
    max_new_tokens = 2048
    stop = ("\nProblem:",)
    chat = True

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def problems(self, limit: int | None = None) -> list[Problem]:
        # Better told now than behind the first answer.
        check("task math", "math_verify")
        path = find_data(self.name, self._data, hub=HUB)
        found: list[Problem] = []
        for where, row in read_rows(path):
            if limit is not None and len(found) >= limit:
                break
            question = field(row, where, "problem", "question")
            solution = field(row, where, "solution", "answer")
            answer = field(row, where, "answer") if "answer" in row else last_boxed(solution)
            if answer is None:
                raise TaskError(f"{where}:solution: expected a \\boxed{{}} answer in it")
            reference = solution if boxed(solution) else None
            name = f"math-{len(found):05d}"
            prompt = f"{question.strip()}\n{REQUEST}"
            found.append(Problem(name, prompt, answer, reference, "boxed"))
        return found

    def plain_prompt(self, problem: Problem) -> str:
        return f"Problem: {problem.prompt}\nSolution:"

    def judge(self, problem: Problem, text: str) -> Verdict:
        """ICA: the content of the last box equals the answer. PIA: that, or, where there is no
        box with an answer, the last formula or number of the text does."""
        # Between dollars, or math-verify reads little of either: bare answers of MATH-500 differ
        # from their own boxed form in 108 of 500 cases.
        gold, box = f"${problem.answer}$", last_boxed(text)
        if box is not None:
            if box == problem.answer:
                return Verdict(True, True, True, box)
            right, found = same(gold, f"${box}$")
            if found is not None:
                return Verdict(right, right, True, box)
        right, found = same(gold, text)
        return Verdict(False, right, found is not None, found)
