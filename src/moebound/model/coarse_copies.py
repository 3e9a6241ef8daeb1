"""HOBBIT's rule at its worst, in memory: every expert counts as missed.

What the policy does not skip and calls coarse is computed with the experts of a second model, the
same under a wider bound, and everything else with the model's own (`skip_policies.HobbitRe`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from moebound.errors import MoeboundError
from moebound.model.calls import arguments
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.skip_policies import HobbitRe, Policy
from moebound.model.skipping import Skipped, skip_in, without


@contextmanager
def skipping_with_copies(model: nn.Module, policy: Policy, coarse: nn.Module) -> Iterator[Skipped]:
    """As `skipping`; `coarse` of what is yielded counts the pairs that were computed with a copy.

    coarse: a loaded model. Raises as `skip_in`, and MoeboundError for a policy that has no use for
    copies, and for a model whose experts are not the same in number and size.
    """
    if not isinstance(policy, HobbitRe):
        raise MoeboundError(
            f"--skip {policy.setting} has no use for coarser copies: leave them out"
        )
    both = [live_experts(which).stacks for which in (model, coarse)]
    shapes = [[(e.layer, [p.shape for p in e.module.parameters()]) for e in s] for s in both]
    if shapes[0] != shapes[1]:
        raise MoeboundError("coarse: its experts are not those of the model (number or sizes)")
    counts = Skipped()

    def count(layer: int, weights: torch.Tensor, skipped: torch.Tensor) -> None:
        counts.add(layer, weights, skipped)
        counts.coarse += int((policy.coarser(weights) & ~skipped).sum())

    with ExitStack() as hooks:
        grading = [_Grading(owner, copy.module, policy) for owner, copy in zip(*both, strict=True)]
        # Hooks run in the order in which they are registered: in front of skipping, and behind it.
        for each in grading:
            hooks.callback(
                each.module.register_forward_pre_hook(each.grade, with_kwargs=True).remove
            )
        hooks.enter_context(skip_in(model, policy, count))
        for each in grading:
            hooks.callback(
                each.module.register_forward_pre_hook(each.part, with_kwargs=True).remove
            )
            hooks.callback(each.module.register_forward_hook(each.add).remove)
        yield counts


class _Grading:
    """One call of an experts module at a time."""

    def __init__(self, owner: ExpertsModule, copy: nn.Module, policy: HobbitRe) -> None:
        self.module, self._copy = owner.module, copy
        self._n_experts, self._policy = owner.stack.n_experts, policy
        self._low = torch.zeros(0)
        self._rest: tuple[Any, ...] = ()

    def grade(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """By the router's own weights. [..., E]: which a token gets from the copy."""
        _, index, weights, *_ = arguments(args, kwargs)
        low = self._policy.coarser(weights)
        table = torch.zeros((*index.shape[:-1], self._n_experts), dtype=torch.bool)
        self._low = table.to(index.device).scatter(-1, index, low)

    def part(
        self, _module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of what is left, what the model's own experts compute."""
        hidden, index, weights, *rest = arguments(args, kwargs)
        low = self._low.gather(-1, index) & (weights != 0)
        self._rest = (hidden, *without(index, weights, ~low, rescale=False), *rest)
        return (hidden, *without(index, weights, low, rescale=False), *rest), {}

    def add(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = output + self._copy(*self._rest)
        return whole
