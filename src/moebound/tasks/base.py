"""What a task is: problems, and a judge of what a model answers.

Two accuracies, as in the MoE-Compression paper (2509.07727, section 3.2.2):

    ICA  instruction compliance accuracy: the right answer, in the format that was asked for
    PIA  pure inference accuracy: the right answer, in whatever format

PIA is never below ICA: what counts for the one counts for the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem. prompt: what the model is asked. answer: the right answer, as the task has it.

    reference: a right solution, worded as the model is expected to, for teacher forcing; None where
    the task has none. format: the answer format that the prompt asks for; "" for none.
    """

    id: str
    prompt: str
    answer: str
    reference: str | None = None
    format: str = ""


@dataclass(frozen=True)
class Verdict:
    """ica, pia: see above. valid: the text gives an answer at all, right or wrong. extracted: that
    answer, as written."""

    ica: bool
    pia: bool
    valid: bool
    extracted: str | None


class Task(ABC):
    """A list of problems that is the same every time, and a judge without memory.

    name: as `get_task` takes it. max_new_tokens: where an answer is cut off. stop: texts that end
    an answer, besides the model's own end mark. chat: a prompt is a message of a user, and is put
    into the tokenizer's chat template where it has one.
    """

    name: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    chat: bool = False

    @abstractmethod
    def problems(self, limit: int | None = None) -> list[Problem]:
        """The first `limit` problems; all for None. Raises MoeboundError if they cannot be read."""

    @abstractmethod
    def judge(self, problem: Problem, text: str) -> Verdict:
        """What a completion of the problem's prompt is worth."""

    def plain_prompt(self, problem: Problem) -> str:
        """What a model without a chat template reads."""
        return problem.prompt


def first(problems: Sequence[Problem], limit: int | None) -> list[Problem]:
    """The first `limit`, all for None."""
    return list(problems if limit is None else problems[:limit])
