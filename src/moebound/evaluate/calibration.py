"""The text that a map is measured on: prompts with their solutions, read at once.

Teacher forced: position t of a sequence predicts token t + 1. What counts (`scored`) are all
positions, or those that predict the solution or its end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebound.errors import MoeboundError
from moebound.evaluate.text import Batch
from moebound.score import Tokens


@dataclass(frozen=True, eq=False)
class Calibration:
    """N sequences of at most L tokens, padded on the right, shortest first.

    input_ids, attention_mask: [N, L]. scored, answers: [N, L] bool, positions that count and those
    that predict the solution or its end. lengths: tokens of each sequence up to its last scored
    position, which are all that the scores depend on. tokens: which of them count.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    scored: torch.Tensor
    answers: torch.Tensor
    lengths: tuple[int, ...]
    tokens: Tokens

    @property
    def n_sequences(self) -> int:
        return len(self.lengths)

    @property
    def n_positions(self) -> int:
        return int(self.scored.sum())

    @property
    def digest(self) -> str:
        """Names the tokens: another text has another one."""
        data = self.input_ids.to(torch.int64).numpy().tobytes()
        return hashlib.sha256(data + self.scored.numpy().tobytes()).hexdigest()[:16]

    def batches(self, tokens: int) -> Iterator[slice]:
        """Neighbouring sequences, of at most so many tokens together, padding counted; one
        sequence at least."""
        start = 0
        for stop in range(1, self.n_sequences + 1):
            longer = stop < self.n_sequences and self.lengths[stop] * (stop + 1 - start) > tokens
            if stop == self.n_sequences or longer:
                yield slice(start, stop)
                start = stop

    def inputs(self, rows: slice | torch.Tensor, device: torch.device) -> dict[str, Any]:
        """What the model is called with, cut to the longest of these sequences."""
        length = self.longest(rows)
        return {
            "input_ids": self.input_ids[rows, :length].to(device),
            "attention_mask": self.attention_mask[rows, :length].to(device),
            "use_cache": False,
        }

    def batch(self, rows: slice) -> Batch:
        """These sequences as text to compare on: every token read predicts one that is there."""
        length = self.longest(rows)
        mask = self.attention_mask[rows, :length]
        return Batch(self.input_ids[rows, :length], mask, mask.bool(), self.answers[rows, :length])

    def longest(self, rows: slice | torch.Tensor) -> int:
        return int(torch.tensor(self.lengths)[rows].max())


def calibration_of(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], tokens: Tokens = "answers"
) -> Calibration:
    """From token ids of (prompt, solution), the end mark included. tokens: which of them count.

    Raises MoeboundError where there are none, or a prompt or solution is empty.
    """
    if not rows:
        raise MoeboundError("no problems to calibrate on")
    for prompt, solution in rows:
        if not prompt or not solution:
            raise MoeboundError("a problem to calibrate on has an empty prompt or solution")
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    length = len(ordered[-1][0]) + len(ordered[-1][1]) - 1
    input_ids = torch.zeros(len(ordered), length, dtype=torch.long)
    mask, answers = torch.zeros_like(input_ids), torch.zeros(input_ids.shape, dtype=torch.bool)
    lengths = []
    for index, (prompt, solution) in enumerate(ordered):
        # The last token is predicted, and predicts nothing: it is not read.
        read = [*prompt, *solution][:-1]
        input_ids[index, : len(read)] = torch.tensor(read)
        mask[index, : len(read)] = 1
        answers[index, len(prompt) - 1 : len(read)] = True
        lengths.append(len(read))
    scored = answers if tokens == "answers" else mask.bool()
    return Calibration(input_ids, mask, scored, answers, tuple(lengths), tokens)
