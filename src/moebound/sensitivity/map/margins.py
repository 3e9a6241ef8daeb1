"""How near a router is to another choice: the margin between the last expert chosen and the next.

A router's scores are heard where they are turned into a choice: every family calls `topk` on them.
So the margin is a function of the model that autograd can differentiate, whatever lies between
(sigmoid or softmax, bias, groups). Families whose choice cannot be heard have no margins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class Margin:
    """values: [T], of the chosen with the lowest score over the best of the others, with autograd.
    last, next: [T], which experts those are."""

    values: torch.Tensor
    last: torch.Tensor
    next: torch.Tensor


class Choices(TorchFunctionMode):
    """Inside of the `with`, remembers the scores of which the most recent choice was made."""

    def __init__(self) -> None:
        super().__init__()
        self._scores: torch.Tensor | None = None
        self._k = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else given["input"]
            self._scores, self._k = scores, int(args[1] if len(args) > 1 else given["k"])
        return func(*args, **given)

    def take(self, n_tokens: int, n_experts: int) -> Margin | None:
        """The margins of the most recent choice, if it was one of these experts by these tokens."""
        scores, self._scores = self._scores, None
        if scores is None or scores.numel() != n_tokens * n_experts or not self._k < n_experts:
            return None
        if scores.shape[-1] != n_experts:
            return None
        with torch.enable_grad():
            best = scores.reshape(n_tokens, n_experts).topk(self._k + 1, dim=-1)
            values = best.values[:, -2] - best.values[:, -1]
        self._scores = None  # of the choice just made here, if inside of the `with`
        return Margin(values, best.indices[:, -2], best.indices[:, -1])
