"""Teacher forcing: a model reads prompts with solutions, once as it is and then with errors in it.

With p the distribution of the next token without an error and q with it, over the positions that
predict the solution or its end:

  kl     mean of KL(p || q) = Σ p (ln p - ln q), nats a position, in float64
  top1   share of positions where both hold the same token for the most likely

Cheap (one pass, no generation) and sensitive: it moves long before an answer changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from moebound.errors import UnsupportedArchitectureError
from moebound.evaluate.fidelity import divergence
from moebound.sensitivity.live import LiveExperts
from moebound.sensitivity.map.calibration import Calibration, calibration_of
from moebound.sensitivity.study.flow import FlowSum, Heard, Listener

MEMORY_BYTES = 2 << 30
"""What may be kept of the unperturbed pass; fewer problems are read where it would be more."""
BATCH_TOKENS = 4096
_ROWS = 512  # positions compared at a time

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its solution with the end mark."""


@dataclass(frozen=True)
class Difference:
    """kl, top1: see above; kl is None where the model's output is no number any more. n_positions:
    compared. where: see `flow.py`, None if it cannot be heard."""

    kl: float | None
    top1: float
    n_positions: int
    where: dict[str, list[float]] | None


class Reading:
    """One text, and what the model makes of it when this object is made: the baseline."""

    def __init__(self, model: Any, experts: LiveExperts, pairs: Sequence[Pair]) -> None:
        self._model = model
        try:
            self._listener: Listener | None = Listener(model, experts)
        except UnsupportedArchitectureError:
            self._listener = None
        self._text = calibration_of(_fitting(model, pairs, self._listener))
        self._before: list[tuple[torch.Tensor, Heard]] = []
        self._before = list(self._read())

    @property
    def n_problems(self) -> int:
        return self._text.n_sequences

    @torch.inference_mode()
    def compare(self) -> Difference:
        """The model as it is now, to what it was."""
        total, agreed, n_positions = 0.0, 0, 0
        flow = FlowSum()
        for (p, was), (q, now) in zip(self._before, self._read(), strict=True):
            total += _kl_sum(p, q)
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum()) if bool(q.isfinite().all()) else 0
            n_positions += len(p)
            flow.add(was, now)
        kl = max(0.0, total / n_positions)  # rounding can make an exact 0 negative
        return Difference(
            kl if math.isfinite(total) else None,
            agreed / n_positions,
            n_positions,
            flow.to_json() if self._listener is not None else None,
        )

    @torch.inference_mode()
    def _read(self) -> Iterator[tuple[torch.Tensor, Heard]]:
        """Batch by batch: logits [scored positions, V], and what was heard of the real tokens."""
        text = self._text
        for rows in text.batches(BATCH_TOKENS):
            listening = nullcontext(Heard()) if not self._listener else self._listener.listening()
            with listening as heard:
                inputs = text.inputs(rows, self._model.device)
                logits = self._model(**inputs).logits
            scored = text.scored[rows, : logits.shape[1]].to(logits.device)
            yield logits[scored].float(), self._real(text, rows, heard)

    def _real(self, text: Calibration, rows: slice, heard: Heard) -> Heard:
        mask = text.attention_mask[rows, : text.longest(rows)].bool()
        try:
            return heard.real(mask)
        except (RuntimeError, IndexError):  # a family with another shape of hidden states
            self._listener = None
            return Heard()


def _kl_sum(p: torch.Tensor, q: torch.Tensor) -> float:
    total = 0.0
    for start in range(0, len(p), _ROWS):
        a = torch.log_softmax(p[start : start + _ROWS].double(), -1)
        b = torch.log_softmax(q[start : start + _ROWS].double(), -1)
        total += float(divergence(a, b).sum())
    return total


def _fitting(model: Any, pairs: Sequence[Pair], listener: Listener | None) -> list[Pair]:
    """The first problems, as many as may be kept; one at least."""
    config = model.config.get_text_config(decoder=True)
    n_layers = listener.n_layers if listener else 0
    logits, hidden = 4 * int(config.vocab_size), 4 * n_layers * int(config.hidden_size)
    size = 0
    chosen: list[Pair] = []
    for prompt, solution in pairs:
        size += logits * len(solution) + hidden * (len(prompt) + len(solution))
        if chosen and size > MEMORY_BYTES:
            break
        chosen.append((prompt, solution))
    return chosen
