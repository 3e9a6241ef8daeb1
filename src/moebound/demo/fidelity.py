"""How far is a compressed model from the original one, on the same text?

Teacher forced: both models read the prompt and the reference solution, and their distributions of
the next token are compared position by position. With p of the original and q of the compressed,

    KL(p || q) = sum over tokens of p (ln p - ln q),  in nats,

which is 0 only where both agree on every token's probability. Padding never counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moebound.demo.prompts import Batch

ROWS_AT_A_TIME = 50


@dataclass(frozen=True)
class Fidelity:
    """kl_nats: mean over the positions that have a next token; kl_stderr: its standard error, with
    prompts (not tokens, which are not independent) as the sample. answer_kl_nats: the mean over
    the solutions' tokens only. top1_agreement: share of positions where both hold the same token
    for the most likely. reproduced: prompts whose reference solution is, token for token, what
    greedy decoding gives, so right and in the format asked.
    """

    kl_nats: float
    kl_stderr: float
    answer_kl_nats: float
    top1_agreement: float
    reproduced: int
    per_prompt: tuple[bool, ...]


@torch.inference_mode()
def log_probabilities(model: Any, batch: Batch) -> torch.Tensor:
    """ln of the next token's distribution at every position: [B, T - 1, vocabulary], float64."""
    parts = []
    for start in range(0, len(batch.input_ids), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        logits = model(
            input_ids=batch.input_ids[rows],
            attention_mask=batch.attention_mask[rows],
            use_cache=False,
        ).logits
        parts.append(torch.log_softmax(logits[:, :-1].double(), dim=-1))
    return torch.cat(parts)


def compare(original: torch.Tensor, compressed: torch.Tensor, batch: Batch) -> Fidelity:
    """Both [B, T - 1, vocabulary], natural logarithms of probabilities."""
    # A probability of 0 contributes nothing, where 0 · (-inf - x) would be NaN.
    terms = torch.where(original > -torch.inf, original.exp() * (original - compressed), 0.0)
    kl = terms.sum(-1)  # [B, T - 1]
    predicts, answers = batch.predicts, batch.answers
    predicted = compressed.argmax(-1)
    agrees = predicted == original.argmax(-1)
    right = (predicted == batch.input_ids[:, 1:]) | ~answers
    reproduced = right.all(dim=1)
    return Fidelity(
        kl_nats=float(kl[predicts].mean()),
        kl_stderr=_ratio_stderr((kl * predicts).sum(1), predicts.sum(1).double()),
        answer_kl_nats=float(kl[answers].mean()),
        top1_agreement=float(agrees[predicts].double().mean()),
        reproduced=int(reproduced.sum()),
        per_prompt=tuple(bool(value) for value in reproduced),
    )


def _ratio_stderr(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Standard error of sum(sums) / sum(counts) over rows (the usual linearization)."""
    n = len(sums)
    if n < 2:
        return math.nan
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(residuals.std() * math.sqrt(n) / counts.sum())
