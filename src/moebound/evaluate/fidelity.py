"""How far is a changed model from the original one, on the same text?

Teacher forced: both models read the prompt and the reference solution, and their distributions of
the next token are compared position by position (`kl.py`). Padding never counts. The original's
predictions are computed once and kept (`Baseline`); any number of models are compared to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moebound.evaluate.kl import Predicted, Sums, kept_tokens
from moebound.evaluate.text import Batch, Rows, batches, pad
from moebound.score import Score

ROWS_AT_A_TIME = 50
LOGITS_BYTES = 128 << 20
"""What the logits of one batch may take, in float64."""


@torch.inference_mode()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """[B, T, V]."""
    parts = []
    for start in range(0, len(batch.input_ids), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        parts.append(
            model(
                input_ids=batch.input_ids[rows].to(model.device),
                attention_mask=batch.attention_mask[rows].to(model.device),
                use_cache=False,
            ).logits
        )
    return torch.cat(parts)


def vocabulary_of(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a model predicts on some text, to compare others to. parts: the problems of each batch,
    the batch, and what was said there. Memory: positions times kept tokens; see `kl.py`."""

    n_rows: int
    parts: tuple[tuple[torch.Tensor, Batch, list[Predicted]], ...]

    @classmethod
    def of(cls, model: Any, rows: Rows, *, pad_token: int = 0, kept: int | None = None) -> Baseline:
        """Read all rows with a model. kept: tokens of each distribution that are kept apart; None
        for all of a small vocabulary, KEPT_TOKENS of a large one."""
        size = vocabulary_of(model)
        n_kept = kept_tokens(size) if kept is None else kept
        some = (
            (torch.tensor(indices), pad([rows[index] for index in indices], pad_token))
            for indices in batches(rows, max(1, LOGITS_BYTES // (8 * size)))
        )
        return cls.read(model, some, n_kept)

    @classmethod
    def read(
        cls,
        model: Any,
        batches: Iterable[tuple[torch.Tensor, Batch]],
        kept: int | None,
        *,
        whole_answers: bool = False,
    ) -> Baseline:
        """In batches that are made already. whole_answers: of the positions of solutions keep all
        of the distribution, however large."""
        parts = []
        for rows, batch in batches:
            logits = logits_of(model, batch)
            parts.append((rows, batch, predicted(logits, batch, kept, whole_answers=whole_answers)))
        return cls(sum(len(rows) for rows, _, _ in parts), tuple(parts))

    def compare(self, model: Any) -> Score:
        """Read the same text with another model (or the same one, changed)."""
        sums = Sums(self.n_rows)
        for rows, batch, before in self.parts:
            sums.add(rows, batch, before, logits_of(model, batch))
        return sums.score()


def predicted(
    logits: torch.Tensor, batch: Batch, kept: int | None, *, whole_answers: bool = False
) -> list[Predicted]:
    """What is kept of a batch: see `Baseline.read`."""
    if kept is None or not whole_answers:
        return [Predicted.of(logits, batch.predicts, kept)]
    prompts = batch.predicts & ~batch.answers
    return [Predicted.of(logits, batch.answers, None), Predicted.of(logits, prompts, kept)]
