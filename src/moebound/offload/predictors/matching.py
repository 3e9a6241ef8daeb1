"""Texts of the past that went through the experts as this one does (MoE-Infinity, 2401.14361).

Of each text a matrix is kept: how often each expert of each layer was chosen. The one nearest to
the current text's (cosine, averaged over layers) says which experts will come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from moebound.offload.predictors.base import Layers, Predictor, by_count

KEPT = 64
"""Matrices of the past; the oldest goes."""


class ActivationMatching(Predictor):
    """Knows nothing before the first text has ended."""

    name: ClassVar[str] = "matching"

    def begin(self, layers: Layers) -> None:
        super().begin(layers)
        self._rows = {layer: row for row, layer in enumerate(layers.order)}
        self._shape = (len(layers.order), max(layers.n_experts.values()))
        self._past: deque[np.ndarray] = deque(maxlen=KEPT)
        self._now = np.zeros(self._shape)
        self._match: np.ndarray | None = None

    def begin_sequence(self) -> None:
        if self._now.any():
            self._past.append(self._now)
        self._now = np.zeros(self._shape)
        self._match = None

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        row = self._rows[layer]
        self._now[row, list(experts)] += 1
        if row == self._shape[0] - 1:
            self._match = self._nearest()

    def guess(self, layer: int, x: torch.Tensor, coming: int) -> Sequence[int]:
        if self._match is None:
            return ()
        return by_count(self._match[self._rows[coming]], self.layers.top_k)

    def _nearest(self) -> np.ndarray | None:
        if not self._past:
            return None
        past = np.stack(self._past)
        inner = (past * self._now).sum(-1)
        norms = np.linalg.norm(past, axis=-1) * np.linalg.norm(self._now, axis=-1)
        likeness = np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0).mean(-1)
        found: np.ndarray = past[int(likeness.argmax())]
        return found
