"""GSM8K: grade-school word problems (Cobbe et al. 2021), the paper's main task.

The answer is asked for in a box, as the paper reports ("the `box{}` format required by
instructions"). Its exact prompt is not published; this is the wording that is usual for
such models.
"""

from __future__ import annotations

import re
from pathlib import Path

from moebound.errors import TaskError
from moebound.tasks.answers import (
    NUMBER,
    after_hashes,
    as_number,
    in_sentence,
    last_boxed,
    last_number,
    same_number,
)
from moebound.tasks.base import Problem, Task, Verdict
from moebound.tasks.rows import field, find_data, read_rows

REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
_CALCULATOR = re.compile(r"<<[^>]*>>")
HUB = ("openai/gsm8k", "main/test-00000-of-00001.parquet")


class Gsm8k(Task):
    """data: the file with the problems (fields question and answer), or None to look for it."""

    name = "gsm8k"
    max_new_tokens = 1024
    stop = ("\nProblem:",)  # where a model without a chat template goes on asking itself
    chat = True

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def problems(self, limit: int | None = None) -> list[Problem]:
        path = find_data(self.name, self._data, hub=HUB)
        found: list[Problem] = []
        for where, row in read_rows(path):
            if limit is not None and len(found) >= limit:
                break
            question, solution = field(row, where, "question"), field(row, where, "answer")
            answer = after_hashes(solution)
            if answer is None or as_number(answer) is None:
                raise TaskError(f"{where}:answer: expected to end in #### and a number")
            name = f"gsm8k-{len(found):05d}"
            prompt = f"{question.strip()}\n{REQUEST}"
            answer = answer.replace(",", "")
            found.append(Problem(name, prompt, answer, _reference(solution, answer), "boxed"))
        return found

    def plain_prompt(self, problem: Problem) -> str:
        return f"Problem: {problem.prompt}\nSolution:"

    def judge(self, problem: Problem, text: str) -> Verdict:
        """ICA: the last box has the right number. PIA: that, or, where no box has a number, the
        number that the text ends with is right: behind ####, in "the answer is", or the last."""
        box = last_boxed(text)
        number = None if box is None else _number_in(box)
        if number is not None:
            right = same_number(number, problem.answer)
            return Verdict(right, right, True, number)
        stated = after_hashes(text) or in_sentence(text)
        number = (stated and _number_in(stated)) or last_number(text)
        right = number is not None and same_number(number, problem.answer)
        return Verdict(False, right, number is not None, number)


def _number_in(text: str) -> str | None:
    """A number that is all of the text, or the only one in it ("18 dollars"); no formula's."""
    if as_number(text) is not None:
        return text
    plain = text.replace("\\$", "").replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    found = NUMBER.findall(plain)
    return found[0] if len(found) == 1 and not any(mark in plain for mark in "/^=+*") else None


def _reference(solution: str, answer: str) -> str:
    """The data set's own solution, without the calculator marks <<...>>, and with a box."""
    steps = _CALCULATOR.sub("", solution.rsplit("####", 1)[0]).strip()
    return f"{steps}\nThe final answer is \\boxed{{{answer}}}."
