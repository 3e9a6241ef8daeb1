"""What the model thought of each token of a text: log probabilities, and those of its rivals.

They are those of the model, in float32: before temperature, penalties, biases and whatever else
decides which token is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moebound.text.token_texts import TokenTexts


@dataclass(frozen=True)
class Likely:
    """A token and its log probability. data: what it adds to the text, None where unknown."""

    token: int
    text: str
    data: bytes | None
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a text. logprob: None of a prompt's first token, which nothing comes before.
    top: the likeliest tokens in its place, from the likeliest. offset: of its text in the whole."""

    token: int
    text: str
    data: bytes | None
    logprob: float | None
    top: tuple[Likely, ...]
    offset: int


class Logprobs:
    """Makes them, for one text. top: how many rivals; 0 for none."""

    def __init__(self, texts: TokenTexts, top: int) -> None:
        self._texts, self._top = texts, top

    def of(self, token: int, scores: torch.Tensor | None, offset: int) -> TokenLogprob:
        """scores: [vocabulary], those that the token was chosen from."""
        logprobs = None if scores is None else scores.float().log_softmax(dim=-1)
        return self._made(token, logprobs, offset)

    def of_all(
        self, tokens: list[int], scores: torch.Tensor, offsets: list[int]
    ) -> list[TokenLogprob]:
        """scores: [tokens, vocabulary], a row before each token."""
        logprobs = scores.float().log_softmax(dim=-1)
        return [
            self._made(token, row, offset)
            for token, row, offset in zip(tokens, logprobs, offsets, strict=True)
        ]

    def _made(self, token: int, logprobs: torch.Tensor | None, offset: int) -> TokenLogprob:
        text, data = self._texts.text(token), self._texts.data(token)
        if logprobs is None:
            return TokenLogprob(token, text, data, None, (), offset)
        top = self._likeliest(logprobs)
        return TokenLogprob(token, text, data, float(logprobs[token]), top, offset)

    def _likeliest(self, logprobs: torch.Tensor) -> tuple[Likely, ...]:
        if not self._top:
            return ()
        values, tokens = logprobs.topk(min(self._top, len(logprobs)))
        return tuple(
            Likely(token, self._texts.text(token), self._texts.data(token), value)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True)
        )
