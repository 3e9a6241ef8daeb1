"""How far two distributions of the next token are apart. Nothing else computes a KL.

    KL(p || q) = sum over tokens of p (ln p - ln q),  in nats, in float64,

which is 0 only where both agree on every token's probability. p is the original's.

What is no number: a model whose output at a position has a NaN in it is infinitely far there, holds
no token for the most likely, and so agrees with nothing and reproduces nothing. A mean with such a
position in it is infinite. Rounding can make an exact 0 negative; a mean is never less than 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moebound.evaluate.text import Batch
from moebound.score import Score
from moebound.score.record import QUANTILES
from moebound.score.statistics import quantile_of, ratio_stderr

WHOLE_VOCABULARY = 4096
"""Up to so many tokens the whole distribution is kept."""
KEPT_TOKENS = 512
"""Of a larger vocabulary, the most likely ones; the others count as one token."""
_POSITIONS = 512  # compared at a time, in float64


def kl(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[P]: KL(before || after) at each position, from logits [P, V]."""
    return torch.cat([divergence(_logs(p), _logs(q)) for p, q in _parts(before, after)])


def divergence(original: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """[...]: KL over the last axis, from logarithms of probabilities."""
    # A probability of 0 contributes nothing, where 0 · (-inf - x) would be NaN.
    nothing = original == -torch.inf
    terms = torch.where(nothing, 0.0, original.exp() * (original - changed))
    return torch.nan_to_num(terms.sum(-1), nan=math.inf, posinf=math.inf)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """[...]: the most likely token, -1 where the model says nothing."""
    return torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))


def mean(total: float, n: int) -> float:
    """Of sums of KL."""
    return max(0.0, total / n)


def kept_tokens(vocabulary: int) -> int | None:
    """How many are kept of each distribution; None for all, in their order."""
    return KEPT_TOKENS if vocabulary > WHOLE_VOCABULARY else None


def _parts(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The same positions of each, some at a time; one part at least."""
    starts = range(0, max(1, len(tensors[0])), _POSITIONS)
    return [tuple(tensor[start : start + _POSITIONS] for tensor in tensors) for start in starts]


def _logs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def _with_rest(logs: torch.Tensor) -> torch.Tensor:
    """One more column: ln of the probability of all tokens that are not here, 1e-12 at least:
    below that it is the rounding of the sum, which must not look like a difference."""
    rest = torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-12))
    return torch.cat([logs, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a model predicts at some positions of a batch, to compare others with.

    at: [B, T] bool, P of them. kept: logits [P, V], or, where `tokens` [P, K] are kept apart,
    logarithms of their probabilities and of that of all others, [P, K + 1]. best: [P].
    """

    at: torch.Tensor
    tokens: torch.Tensor | None
    kept: torch.Tensor
    best: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, at: torch.Tensor, n_kept: int | None) -> Predicted:
        """logits: [B, T or more, V]. n_kept: see `kept_tokens`."""
        found = logits[:, : at.shape[1]][at.to(logits.device)]
        best = likeliest(found).cpu()
        if n_kept is None or n_kept >= found.shape[-1]:
            return cls(at, None, found, best)
        parts = [_logs(part).topk(n_kept, dim=-1) for (part,) in _parts(found)]
        logs = torch.cat([_with_rest(top).float() for top, _ in parts])
        return cls(at, torch.cat([tokens for _, tokens in parts]), logs, best)

    def compare(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL and whether the most likely token is the same, [P] each, of a model that says this on
        the same batch."""
        found = logits[:, : self.at.shape[1]][self.at.to(logits.device)]
        best = likeliest(found).cpu()
        agrees = (best == self.best) & (best >= 0)
        if self.tokens is None:
            return kl(self.kept, found).cpu(), agrees
        far = [
            divergence(p.double(), _with_rest(_logs(q).gather(-1, tokens)))
            for p, q, tokens in _parts(self.kept, found, self.tokens)
        ]
        return torch.cat(far).cpu(), agrees


class Sums:
    """Sums of each problem, float64: KL, agreements and positions, of all tokens and of those of
    the solution. For quantiles, the KL of every token, float32."""

    def __init__(self, n_problems: int) -> None:
        self._read, self._answers = torch.zeros(2, 3, n_problems, dtype=torch.float64)
        self._reproduced = torch.zeros(n_problems, dtype=torch.bool)
        self._exact, self._knows_targets = True, True
        self._each: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(
        self, rows: torch.Tensor, batch: Batch, before: list[Predicted], logits: torch.Tensor
    ) -> None:
        """rows: which problems the batch is of. before: what the original predicts there, every
        position once. logits: of the model, [B, T or more, V]."""
        far = torch.zeros(batch.predicts.shape, dtype=torch.float64)
        agrees = torch.zeros_like(batch.predicts)
        for part in before:
            far[part.at], agrees[part.at] = part.compare(logits)
            self._exact &= part.tokens is None
        read = batch.predicts
        of = rows[:, None].expand(read.shape)[read]
        self._each.append((far[read].float(), of, batch.answers[read]))
        for mask, sums in ((batch.predicts, self._read), (batch.answers, self._answers)):
            for values, total in zip((far, agrees, mask), sums, strict=True):
                total[rows] = torch.where(mask, values.double(), 0.0).sum(1)
        targets = batch.targets
        if targets is None:
            self._knows_targets = False
            return
        said = likeliest(logits[:, : targets.shape[1]]).cpu()
        self._reproduced[rows] = ((said == targets) | ~batch.answers).all(dim=1)

    def score(self) -> Score:
        (far, agree, n), (answer_far, answer_agree, answer_n) = self._read, self._answers
        each = (answer_far / answer_n).tolist()
        reproduced = self._reproduced.tolist() if self._knows_targets else [None] * len(each)
        return Score(
            kl_nats=mean(float(far.sum()), int(n.sum())),
            kl_stderr=ratio_stderr(far.tolist(), n.tolist()),
            answer_kl_nats=mean(float(answer_far.sum()), int(answer_n.sum())),
            answer_kl_stderr=ratio_stderr(answer_far.tolist(), answer_n.tolist()),
            top1_agreement=float(agree.sum() / n.sum()),
            answer_top1_agreement=float(answer_agree.sum() / answer_n.sum()),
            reproduced=int(self._reproduced.sum()) if self._knows_targets else None,
            n_problems=len(each),
            n_tokens=int(n.sum()),
            n_answer_tokens=int(answer_n.sum()),
            exact=self._exact,
            **self._quantiles(),
            per_problem=tuple(zip(each, reproduced, strict=True)),
            kl_sums=tuple(zip(far.tolist(), answer_far.tolist(), strict=True)),
        )

    def _quantiles(self) -> dict[str, Any]:
        far, of, answers = (torch.cat(parts).numpy() for parts in zip(*self._each, strict=True))
        found: dict[str, Any] = {}
        for prefix, chosen in (("kl", slice(None)), ("answer_kl", answers)):
            values, problems = far[chosen], of[chosen]
            for name, share in QUANTILES.items() if len(values) else ():
                value, stderr = quantile_of(values, problems, share)
                found[f"{prefix}_{name}_nats"] = max(0.0, value)
                found[f"{prefix}_{name}_stderr"] = stderr
        return found
