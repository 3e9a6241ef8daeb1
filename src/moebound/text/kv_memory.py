"""What keys, values and states of running texts take, and whether those of one more fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

AHEAD = 64
"""Tokens that each text is counted with beyond those that it has."""


def held_bytes(cache: Any) -> int:
    """Memory that a cache of transformers keeps tensors in, whatever its family calls them."""
    found = dict[int, int]()
    layers = getattr(cache, "layers", None)
    for layer in [cache] if layers is None else layers:
        for tensor in _tensors(vars(layer).values()):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class KvMemory:
    """budget: bytes for all texts together; None for no limit.

    What a token takes is measured on texts that run, so it holds for every family: the longest one
    tells best. Until the first prompt has been read nothing is known.
    """

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self._per_token: float | None = None
        self._longest = 0

    def saw(self, n_tokens: int, n_bytes: int) -> None:
        """A text of so many tokens takes so many bytes."""
        if n_tokens > self._longest:
            self._longest, self._per_token = n_tokens, n_bytes / n_tokens

    def expected(self, n_tokens: int) -> int:
        """Bytes of a text of so many tokens, as far as is known."""
        return int((self._per_token or 0) * n_tokens)

    def fits(self, taken: int, n_running: int, n_prompt: int) -> bool:
        """Whether a text with this prompt has room beside others, which take so much."""
        if self.budget is None or n_running == 0:
            return True
        if self._per_token is None:
            return False
        more = n_prompt + AHEAD * (n_running + 1)
        return taken + self.expected(more) <= self.budget

    def over(self, taken: int) -> bool:
        return self.budget is not None and taken > self.budget
