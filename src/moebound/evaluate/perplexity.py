"""Token-level perplexity of a text: exp of the mean negative log-likelihood of its tokens.

Read in windows of `length` tokens that overlap by half, so that every token but those of the first
window is predicted from at least half a window of context, and each is counted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from moebound.errors import TaskError
from moebound.evaluate.loading import Loaded
from moebound.evaluate.text import encode_file
from moebound.score.statistics import ratio_stderr
from moebound.text.generation import n_positions

LENGTH = 1024


@dataclass(frozen=True)
class Perplexity:
    """value: e^nats. nats: mean negative log-likelihood a token; stderr: its standard error, the
    stretches of text that were read apart being the sample."""

    value: float
    nats: float
    stderr: float

    @classmethod
    def of(cls, sums: Sequence[float], counts: Sequence[float], **more: Any) -> Self:
        """sums, counts: negative log-likelihoods and tokens of each stretch."""
        nats = sum(sums) / sum(counts)
        value = math.exp(nats) if nats < 700 else math.inf
        return cls(value, nats, ratio_stderr(sums, counts), **more)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TextPerplexity(Perplexity):
    """Of a text, window by window. n_tokens: tokens that were predicted. length: tokens of a
    window."""

    n_tokens: int
    length: int


def perplexity(
    loaded: Loaded,
    path: Path,
    *,
    limit: int | None = None,
    length: int = LENGTH,
    progress: Callable[[int, int], None] | None = None,
) -> TextPerplexity:
    """Of the text in a UTF-8 file. limit: the first so many tokens. length: of a window, at most
    what the model has positions for. Raises TaskError for a file that cannot be read, or is too
    short to predict anything.
    """
    ids = encode_file(loaded, path, limit)
    if len(ids) < 2:
        raise TaskError(f"{path}: {len(ids)} tokens; expected two or more")
    length = min(length, n_positions(loaded.model) or length, len(ids))
    step = max(1, length // 2)
    sums: list[float] = []
    counts: list[int] = []
    done = 1  # the first token is predicted from nothing
    start = 0
    while done < len(ids):
        stop = min(start + length, len(ids))
        found = _log_likelihoods(loaded, ids[start:stop])[done - start - 1 :]
        sums.append(-float(found.sum()))
        counts.append(len(found))
        done, start = stop, start + step
        if progress is not None:
            progress(done, len(ids))
    return TextPerplexity.of(sums, counts, n_tokens=sum(counts), length=length)


@torch.inference_mode()
def _log_likelihoods(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """[len(ids) - 1]: ln of the probability of each token but the first."""
    tokens = torch.tensor([ids], device=loaded.device)
    logits = loaded.model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])[:, 0]
