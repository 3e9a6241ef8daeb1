"""How far is a changed model from the original one, on the same text?

Teacher forced: both models read the prompt and the reference solution, and their distributions of
the next token are compared position by position. With p of the original and q of the changed one,

    KL(p || q) = sum over tokens of p (ln p - ln q),  in nats,

which is 0 only where both agree on every token's probability. Padding never counts. The original's
predictions are computed once and kept (`Baseline`); any number of models are compared to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moebound.evaluate.statistics import ratio_stderr
from moebound.evaluate.text import Batch, Rows, batches, pad

ROWS_AT_A_TIME = 50
LOGITS_BYTES = 128 << 20
"""What the logits of one batch may take, in float64."""
WHOLE_VOCABULARY = 4096
"""Up to so many tokens the whole distribution is kept, in float64."""
KEPT_TOKENS = 512
"""Of a larger vocabulary, the most likely ones; the others count as one token."""


@dataclass(frozen=True)
class Fidelity:
    """kl_nats: mean over the positions that have a next token; kl_stderr: its standard error, with
    prompts (not tokens, which are not independent) as the sample. answer_kl_nats: the mean over
    the solutions' tokens only; answer_kl_stderr alike. top1_agreement, answer_top1_agreement:
    share of those positions where both hold the same token for the most likely. reproduced: prompts
    whose reference solution is, token for token, what greedy decoding gives, so right and in the
    format asked; per_prompt: which. prompt_kl: each prompt's mean over its solution's tokens.
    exact: False where the rare tokens of a large vocabulary were compared as one, which makes
    every KL a lower limit.
    """

    kl_nats: float
    kl_stderr: float
    answer_kl_nats: float
    top1_agreement: float
    reproduced: int
    per_prompt: tuple[bool, ...]
    answer_kl_stderr: float = math.nan
    answer_top1_agreement: float = math.nan
    prompt_kl: tuple[float, ...] = ()
    exact: bool = True

    def to_json(self) -> dict[str, Any]:
        """The figures, without those of single prompts."""
        return {k: v for k, v in vars(self).items() if k not in ("per_prompt", "prompt_kl")}


@torch.inference_mode()
def log_probabilities(model: Any, batch: Batch) -> torch.Tensor:
    """ln of the next token's distribution at every position: [B, T - 1, vocabulary], float64."""
    parts = []
    for start in range(0, len(batch.input_ids), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        logits = model(
            input_ids=batch.input_ids[rows].to(model.device),
            attention_mask=batch.attention_mask[rows].to(model.device),
            use_cache=False,
        ).logits
        parts.append(torch.log_softmax(logits[:, :-1].double(), dim=-1))
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class _Part:
    """The original's predictions of one batch. rows: which. tokens: [P, kept], or None for all in
    order. logs: [P, kept], and, where tokens are kept, one more column for all others. best: [P].
    P: the positions of `batch.predicts`, row by row."""

    rows: list[int]
    batch: Batch
    tokens: torch.Tensor | None
    logs: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a model predicts on some text, to compare others to. Memory: positions times kept
    tokens; see WHOLE_VOCABULARY and KEPT_TOKENS."""

    n_rows: int
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, model: Any, rows: Rows, *, pad_token: int = 0, kept: int | None = None) -> Baseline:
        """Read all rows with a model. kept: tokens of each distribution that are kept apart; None
        for all of a small vocabulary, KEPT_TOKENS of a large one."""
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        if kept is None and vocabulary > WHOLE_VOCABULARY:
            kept = KEPT_TOKENS
        parts = []
        for indices in batches(rows, max(1, LOGITS_BYTES // (8 * vocabulary))):
            batch = pad([rows[index] for index in indices], pad_token)
            logs = log_probabilities(model, batch)[batch.predicts]
            best = logs.argmax(-1).cpu()
            if kept is None or kept >= logs.shape[-1]:
                parts.append(_Part(indices, batch, None, logs, best))
            else:
                top, tokens = logs.topk(kept, dim=-1)
                parts.append(_Part(indices, batch, tokens, _with_rest(top).float(), best))
        return cls(len(rows), tuple(parts))

    @property
    def exact(self) -> bool:
        return all(part.tokens is None for part in self.parts)

    def compare(self, model: Any) -> Fidelity:
        """Read the same text with another model (or the same one, changed)."""
        sums = _Sums.empty(self.n_rows)
        for part in self.parts:
            whole = log_probabilities(model, part.batch)
            logs, predicted = whole[part.batch.predicts], whole.argmax(-1)
            if part.tokens is not None:
                logs = _with_rest(logs.gather(-1, part.tokens))
            kl = torch.zeros(predicted.shape, dtype=torch.float64)
            kl[part.batch.predicts] = divergence(part.logs.double(), logs).cpu()
            predicted = predicted.cpu()
            agrees = torch.zeros(predicted.shape, dtype=torch.bool)
            agrees[part.batch.predicts] = predicted[part.batch.predicts] == part.best
            sums.add(part.rows, part.batch, kl, agrees, predicted)
        return sums.fidelity(exact=self.exact)


def divergence(original: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """KL over the last axis, from logarithms of probabilities. A model whose output is NaN is
    infinitely far."""
    # A probability of 0 contributes nothing, where 0 · (-inf - x) would be NaN.
    terms = torch.where(original > -torch.inf, original.exp() * (original - changed), 0.0)
    return torch.nan_to_num(terms.sum(-1), nan=math.inf, posinf=math.inf)


def _with_rest(logs: torch.Tensor) -> torch.Tensor:
    """One more column: ln of the probability of all tokens that are not here, 1e-12 at least:
    below that it is the rounding of the sum, which must not look like a difference."""
    rest = torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-12))
    return torch.cat([logs, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of each row, float64: KL, agreements and positions, of all and of the solution."""

    kl: torch.Tensor
    agree: torch.Tensor
    n: torch.Tensor
    answer_kl: torch.Tensor
    answer_agree: torch.Tensor
    answer_n: torch.Tensor
    right: torch.Tensor

    @classmethod
    def empty(cls, n_rows: int) -> _Sums:
        return cls(*(torch.zeros(n_rows, dtype=torch.float64) for _ in range(7)))

    def add(
        self,
        rows: Sequence[int],
        batch: Batch,
        kl: torch.Tensor,
        agrees: torch.Tensor,
        predicted: torch.Tensor,
    ) -> None:
        """kl, agrees, predicted (token ids): [B, T - 1]; rows: which these are."""
        index = torch.tensor(rows)
        for mask, sums in (
            (batch.predicts, (self.kl, self.agree, self.n)),
            (batch.answers, (self.answer_kl, self.answer_agree, self.answer_n)),
        ):
            for values, total in zip((kl, agrees, mask), sums, strict=True):
                total[index] = torch.where(mask, values.double(), 0.0).sum(1)
        right = (predicted == batch.input_ids[:, 1:]) | ~batch.answers
        self.right[index] = right.all(dim=1).double()

    def fidelity(self, *, exact: bool) -> Fidelity:
        def share(sums: torch.Tensor, counts: torch.Tensor) -> float:
            return float(sums.sum() / counts.sum())

        return Fidelity(
            kl_nats=share(self.kl, self.n),
            kl_stderr=ratio_stderr(self.kl.tolist(), self.n.tolist()),
            answer_kl_nats=share(self.answer_kl, self.answer_n),
            top1_agreement=share(self.agree, self.n),
            reproduced=int(self.right.sum()),
            per_prompt=tuple(bool(value) for value in self.right),
            answer_kl_stderr=ratio_stderr(self.answer_kl.tolist(), self.answer_n.tolist()),
            answer_top1_agreement=share(self.answer_agree, self.answer_n),
            prompt_kl=tuple((self.answer_kl / self.answer_n).tolist()),
            exact=exact,
        )
