"""Experts that a token would be sent to and is not: Lu et al.'s dynamic skipping (2402.14800, 3.3).

A token's experts with weights w_1 >= w_2 >= ... are left out from the second on where

    w_i < beta_l · w_1,     beta_l: the median of w_2 / w_1 in layer l, on a calibration text

and the weights of the others are scaled so that they add up to what all did. Nothing is stored;
less is computed, and of a model whose experts are loaded when they are needed, less is loaded.
What that does to answers is to be measured (`moebound eval --skip`).

Deviations: the paper's models choose two experts; with more, every one behind the first is judged
so. Medians are those of 256 steps (statistic `ratios`). A model whose weights do not add up to 1
keeps their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moebound.errors import MoeboundError, UnsupportedArchitectureError
from moebound.model.calls import arguments
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.taps import gets_decisions

_NAMES = ("hidden_states", "top_k_index", "top_k_weights")


@dataclass
class Skipped:
    """Pairs of a token and an expert it was sent to, padding counted: all, and the skipped."""

    pairs: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        return self.skipped / self.pairs if self.pairs else 0.0


@contextmanager
def skipping(model: nn.Module, betas: Mapping[int, float]) -> Iterator[Skipped]:
    """Inside, a model skips experts; what is yielded counts them. Offloaded models do, too.

    betas: by decoder layer, of every layer with experts; at 0 nothing is skipped. Raises
    MoeboundError for a layer that has none, UnsupportedArchitectureError for a family whose experts
    are not called with the router's weights.
    """
    counts, stacks = Skipped(), live_experts(model).stacks
    for entry in stacks:
        if not gets_decisions(entry.module):
            raise UnsupportedArchitectureError(
                f"{entry.stack.name}: expected experts that are called with ({', '.join(_NAMES)}): "
                "which to skip cannot be said here"
            )
        if entry.layer not in betas:
            raise MoeboundError(
                f"no threshold of layer {entry.layer}; expected statistics of this model, and they "
                f"are of layers {', '.join(map(str, sorted(betas)))}"
            )
    with ExitStack() as hooks:
        for entry in stacks:
            hook = _hook(entry, betas[entry.layer], counts)
            handle = entry.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield counts


def _hook(entry: ExpertsModule, beta: float, counts: Skipped) -> Any:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, index, weights, *rest = arguments(args, kwargs)
        index, weights, skipped = skip(index, weights, beta)
        counts.pairs += index.numel()
        counts.skipped += int(skipped.sum())
        others = {name: value for name, value in kwargs.items() if name not in _NAMES}
        return (hidden, index, weights, *rest), others

    return hook


def skip(
    index: torch.Tensor, weights: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index, weights: [..., K], the router's. The same without the skipped, and which these are: in
    their places stands the token's first expert again, with a weight of 0, so that no other has to
    be there."""
    largest, place = weights.max(dim=-1, keepdim=True)
    skipped = weights < beta * largest
    kept = weights.masked_fill(skipped, 0)
    kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-20))
    return torch.where(skipped, index.gather(-1, place), index), kept.to(weights.dtype), skipped
