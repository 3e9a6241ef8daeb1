"""The next token from the model's scores: the most likely one, or drawn.

Drawn by inverting the distribution function in float64 with a number from a generator of the
request's own: the same seed draws the same text from the same scores, on every device, whatever
else runs in the process.
"""

from __future__ import annotations

import torch

from moebound.errors import MoeboundError

FIRST_LOOK = 1024
"""Tokens that are sorted first for top_p. They nearly always hold the share that is asked for, and
sorting a whole vocabulary takes milliseconds."""


class Sampler:
    """temperature: 0 for the most likely token, always. Then, in this order, of what is left each
    time: top_k: only so many of the likeliest, and what is as likely as the last of them; 0 for
    all. top_p: only the fewest tokens that together have this probability. min_p: only tokens that
    have this share of the likeliest one's probability (arXiv 2407.01082). seed: of the draws; None
    for a new one. The order and the rules are those of transformers."""

    def __init__(
        self,
        temperature: float,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._top_k, self._min_p = top_k, min_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, scores: torch.Tensor) -> int:
        """scores: [vocabulary], any float dtype and device. Returns a token id.

        Raises MoeboundError if the largest is NaN or infinite: such a model says nothing.
        """
        best, token = scores.max(dim=-1)
        if not torch.isfinite(best):
            raise MoeboundError(f"the model's output is no number any more ({best.item()})")
        if self._temperature == 0:
            return int(token)
        # Relative to the best, so that no temperature is too small for the exponential.
        scaled = (scores.double().cpu() - best.double().cpu()) / self._temperature
        if self._top_k:
            scaled = likeliest(scaled, self._top_k)
        probabilities = scaled.softmax(dim=-1)
        if self._top_p >= 1:
            return self._draw(likely(probabilities, self._min_p))
        kept, tokens = _nucleus(probabilities, self._top_p)
        return int(tokens[self._draw(likely(kept, self._min_p))])

    def _draw(self, probabilities: torch.Tensor) -> int:
        reached = probabilities.cumsum(dim=-1)
        at = torch.rand(1, generator=self._generator, dtype=torch.float64) * reached[-1]
        # right: a token whose probability is 0 is never drawn.
        place = int(torch.searchsorted(reached, at, right=True))
        return min(place, len(probabilities) - 1)


def likeliest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Minus infinity for scores below the count-th: transformers' TopKLogitsWarper."""
    last = scores.topk(min(count, len(scores)))[0][-1]
    return scores.masked_fill(scores < last, float("-inf"))


def likely(probabilities: torch.Tensor, share: float) -> torch.Tensor:
    """0 for those below this share of the largest: transformers' MinPLogitsWarper."""
    if share <= 0:
        return probabilities
    return probabilities.masked_fill(probabilities < share * probabilities.amax(), 0.0)


def _nucleus(probabilities: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest tokens that reach `share`, most likely first: (probabilities, token ids)."""
    for size in (min(FIRST_LOOK, len(probabilities)), len(probabilities)):
        kept, tokens = probabilities.topk(size)
        reached = kept.cumsum(dim=-1)
        if reached[-1] >= share:
            break
    count = min(size, int(torch.searchsorted(reached, share)) + 1)
    return kept[:count], tokens[:count]
