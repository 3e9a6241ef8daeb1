"""Teacher forcing: a model reads prompts with solutions, once as it is and then with errors in it.

Cheap (one pass, no generation) and sensitive: predictions move long before an answer changes. The
figures are those of every `Score`. Layers in front of the first changed one do what they did
before, so the pass begins behind them, with what entered that layer the first time
(`evaluate/replay.py`); where a model does not let itself be started there, it is run whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from moebound.errors import UnsupportedArchitectureError
from moebound.evaluate.calibration import calibration_of
from moebound.evaluate.fidelity import predicted, vocabulary_of
from moebound.evaluate.kl import Predicted, Sums, kept_tokens
from moebound.evaluate.replay import same_logits, starting_at
from moebound.evaluate.text import Batch
from moebound.model.live import LiveExperts
from moebound.paper.study.flow import FlowSum, Heard, Listener
from moebound.score import Score

MEMORY_BYTES = 2 << 30
"""What may be kept of the unperturbed pass; fewer problems are read where it would be more."""
BATCH_TOKENS = 4096
_TRIED = 2  # sequences that say whether a model can be started at a layer

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its solution with the end mark."""


class Reading:
    """One text, and what the model makes of it when this object is made: the baseline."""

    def __init__(self, model: Any, experts: LiveExperts, pairs: Sequence[Pair]) -> None:
        self._model = model
        try:
            self._listener: Listener | None = Listener(model, experts)
        except UnsupportedArchitectureError:
            self._listener = None
        self._text = calibration_of(_fitting(model, pairs, self._listener), "answers")
        self._kept = kept_tokens(vocabulary_of(model))
        self._before: list[_Part] = []
        for rows in self._text.batches(BATCH_TOKENS):
            logits, heard = self._run(rows)
            batch = self._text.batch(rows)
            before = predicted(logits, batch, self._kept, whole_answers=True)
            self._before.append(_Part(rows, batch, before, heard))
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
            part = self._before[0]
            n = min(_TRIED, self.n_problems)
            few, said = slice(part.rows.start, part.rows.start + n), part.before[0]
            try:
                logits, _ = self._run(few, part, layer)
                now = logits[said.at[:n, : logits.shape[1]].to(logits.device)].float()
                self._starts[layer] = same_logits(said.kept[: len(now)].float(), now)
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
                self._starts[layer] = False
        return self._starts[layer]

    @torch.inference_mode()
    def compare(self, first: int = 0) -> Score:
        """The model as it is now, to what it was. first: the decoder layer that differs first;
        those before it are not run, if `starts_at` has said that this is possible."""
        start = first if self._starts.get(first, False) else 0
        sums, flow = Sums(self.n_problems), FlowSum()
        for was in self._before:
            logits, heard = self._run(was.rows, was, start)
            rows = torch.arange(was.rows.start, was.rows.stop)
            sums.add(rows, was.batch, was.before, logits)
            flow.add(was.heard, heard, self._mask(was.rows))
            del logits, heard  # before the next are made
        return replace(sums.score(), where=flow.to_json() if self._listener is not None else None)

    def starting(self, first: int) -> Starting:
        """To be scored on; see `compare`."""
        return Starting(self, first)

    @torch.inference_mode()
    def _run(
        self, rows: slice, was: _Part | None = None, start: int = 0
    ) -> tuple[torch.Tensor, Heard]:
        """One pass. was: if it is to start at a layer, the batch that begins with these rows."""
        heard = Heard()
        inputs = self._text.inputs(rows, self._model.device)
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
        return logits, self._real(rows, heard)

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
class Starting:
    """A reading whose model differs from decoder layer `first` on."""

    reading: Reading
    first: int

    def compare(self, _model: Any) -> Score:
        return self.reading.compare(self.first)


@dataclass(frozen=True, eq=False)
class _Part:
    """One batch: which sequences, and what the model said and what was heard on the way."""

    rows: slice
    batch: Batch
    before: list[Predicted]
    heard: Heard


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
