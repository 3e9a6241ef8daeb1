"""Teacher forcing: a model reads prompts with solutions, once as it is and then with errors in it.

With p the distribution of the next token without an error and q with it, over the positions that
predict the solution or its end:

  kl     mean of KL(p || q) = Σ p (ln p - ln q), nats a position, in float64
  top1   share of positions where both hold the same token for the most likely

Cheap (one pass, no generation) and sensitive: it moves long before an answer changes. Layers in
front of the first changed one do what they did before, so the pass begins behind them, with what
entered that layer the first time (`map/replay.py`); where a model does not let itself be started
there, it is run whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from moebound.errors import UnsupportedArchitectureError
from moebound.evaluate.calibration import calibration_of
from moebound.evaluate.fidelity import divergence
from moebound.evaluate.replay import same_logits, starting_at
from moebound.model.live import LiveExperts
from moebound.paper.study.flow import FlowSum, Heard, Listener

MEMORY_BYTES = 2 << 30
"""What may be kept of the unperturbed pass; fewer problems are read where it would be more."""
BATCH_TOKENS = 4096
_ROWS = 512  # positions compared at a time
_TRIED = 2  # sequences that say whether a model can be started at a layer

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
        self._before: list[_Part] = []
        self._before = list(self._read(0))
        self._starts: dict[int, bool] = {}

    @property
    def n_problems(self) -> int:
        return self._text.n_sequences

    @torch.inference_mode()
    def starts_at(self, layer: int) -> bool:
        """Whether the model, as it was, can be started at this decoder layer: tried once, so ask
        before it is changed."""
        if self._listener is None or layer <= 0:
            return False
        if layer not in self._starts:
            first = self._before[0].rows.start
            few = slice(first, first + min(_TRIED, self.n_problems))
            try:
                now = self._run(few, self._before[0], layer).logits
                self._starts[layer] = same_logits(self._before[0].logits[: len(now)], now)
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
                self._starts[layer] = False
        return self._starts[layer]

    @torch.inference_mode()
    def compare(self, first: int = 0) -> Difference:
        """The model as it is now, to what it was. first: the decoder layer that differs first;
        those before it are not run, if `starts_at` has said that this is possible."""
        start = first if self._starts.get(first, False) else 0
        total, agreed, n_positions = 0.0, 0, 0
        flow = FlowSum()
        for was, now in zip(self._before, self._read(start), strict=True):
            p, q = was.logits, now.logits
            total += _kl_sum(p, q)
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum()) if bool(q.isfinite().all()) else 0
            n_positions += len(p)
            flow.add(was.heard, now.heard, self._mask(was.rows))
        kl = max(0.0, total / n_positions)  # rounding can make an exact 0 negative
        return Difference(
            kl if math.isfinite(total) else None,
            agreed / n_positions,
            n_positions,
            flow.to_json() if self._listener is not None else None,
        )

    def _read(self, start: int) -> Iterator[_Part]:
        """Batch by batch."""
        for index, rows in enumerate(self._text.batches(BATCH_TOKENS)):
            yield self._run(rows, self._before[index] if start else None, start)

    @torch.inference_mode()
    def _run(self, rows: slice, was: _Part | None = None, start: int = 0) -> _Part:
        """One pass. was: if it is to start at a layer, the batch that begins with these rows."""
        text, heard = self._text, Heard()
        inputs = text.inputs(rows, self._model.device)
        with ExitStack() as stack:
            if self._listener is not None:
                if start and was is not None:
                    n, length = inputs["input_ids"].shape
                    entering = was.heard.hidden[start - 1][:n, :length]
                    layers = self._listener.decoder
                    stack.enter_context(starting_at(layers, start, entering, was.heard.tuples))
                heard = stack.enter_context(self._listener.listening())
            logits = self._model(**inputs).logits
        for layer in range(start):
            heard.hidden.pop(layer, None)  # handed through, not computed
        scored = text.scored[rows, : logits.shape[1]].to(logits.device)
        return _Part(rows, logits[scored].float(), self._real(rows, heard))

    def _mask(self, rows: slice) -> torch.Tensor:
        return self._text.attention_mask[rows, : self._text.longest(rows)].bool()

    def _real(self, rows: slice, heard: Heard) -> Heard:
        try:
            heard.check(self._mask(rows))
        except (RuntimeError, IndexError):  # a family with another shape of hidden states
            self._listener = None
            return Heard()
        return heard


@dataclass(frozen=True, eq=False)
class _Part:
    """One batch: which sequences, logits [scored positions, V], and what was heard on the way."""

    rows: slice
    logits: torch.Tensor
    heard: Heard


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
