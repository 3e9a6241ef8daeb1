"""What changes the model's scores before a token is chosen: penalties and biases.

In the order of transformers: the repetition penalty first, then what is added. Everything is done
in float32, as transformers does it, whatever the model computes in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch


class Penalties:
    """Of one text. prompt_ids: what it goes on from.

    repetition: of transformers and CTRL (arXiv 1909.05858, section 4.1): the score of a token that
    prompt or text have is divided by it, or multiplied where it is below 0. presence, frequency: of
    the OpenAI API: subtracted from the score of a token that the text has, frequency once for each
    time; the prompt does not count. bias: added to the scores of these tokens.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        bias: Mapping[int, float] | None = None,
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition, presence, frequency
        self._bias = dict(bias or {})
        self._seen = dict.fromkeys(prompt_ids) if repetition != 1 else {}
        self._counts = Counter[int]()

    def add(self, token: int) -> None:
        """A token of the text."""
        if self._repetition != 1:
            self._seen[token] = None
        if self._presence or self._frequency:
            self._counts[token] += 1

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """scores: [vocabulary], left as they are. Returns them where there is nothing to do."""
        if not (self._seen or self._counts or self._bias):
            return scores
        scores = scores.float().clone()
        if self._seen:
            at = self._index(self._seen, scores)
            found = scores[at]
            scores[at] = torch.where(found < 0, found * self._repetition, found / self._repetition)
        if self._counts:
            at = self._index(self._counts, scores)
            counts = torch.tensor(list(self._counts.values()), device=scores.device)
            scores[at] -= self._frequency * counts + self._presence
        if self._bias:
            at = self._index(self._bias, scores)
            scores[at] += torch.tensor(
                [self._bias[int(token)] for token in at], device=scores.device
            )
        return scores

    @staticmethod
    def _index(tokens: Iterable[int], scores: torch.Tensor) -> torch.Tensor:
        """Some models have fewer scores than embeddings: what they cannot say is left out."""
        known = [token for token in tokens if token < len(scores)]
        return torch.tensor(known, dtype=torch.long, device=scores.device)
