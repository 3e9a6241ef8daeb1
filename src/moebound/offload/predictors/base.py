"""What a predictor is: at one layer, a guess which experts the next one will choose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moebound.model.routers import Router
from moebound.types import Array


@dataclass(frozen=True)
class Layers:
    """What predictors may know of the model.

    order: decoder indices of the layers with experts, ascending. n_experts: of each. top_k: experts
    a token. routers: of the layers where they can be called on their own.
    """

    order: tuple[int, ...]
    n_experts: Mapping[int, int]
    top_k: int
    routers: Mapping[int, Router]


class Predictor(ABC):
    """Sees what each layer chooses, token by token, and guesses. One text at a time."""

    name: ClassVar[str]

    def begin(self, layers: Layers) -> None:
        """Forget everything. Raises CacheError if it cannot work for this model."""
        self.layers = layers

    def begin_sequence(self) -> None:  # noqa: B027  # some have nothing to do
        """A new text begins."""

    def observe(self, layer: int, experts: Sequence[int]) -> None:  # noqa: B027
        """These were chosen, each once."""

    @abstractmethod
    def guess(self, layer: int, x: torch.Tensor, coming: int) -> Sequence[int]:
        """Experts that layer `coming` will choose, the likeliest first; `layer` is being computed.

        x: [T, H], the input of this layer's experts.
        """


def by_count(counts: Array, n: int) -> list[int]:
    """The n highest, without those at 0."""
    order = counts.argsort(kind="stable")[::-1][:n]
    return [int(i) for i in order if counts[i] > 0]
