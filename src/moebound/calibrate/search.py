"""Which experts of a layer can be left out together: the search of Lu et al., 2402.14800.

For every size r, the set S of r experts that changes the layer's output least on some tokens:

    sum over batches of |F(x) - F_S(x)|_F

F_S is what the layer's own router makes of it with the logits of all others at -inf. The router
runs for every set; what experts put out is computed once for every token and expert, so a set costs
a router's call and a sum. All sets are tried of layers with MOST_ENUMERATED experts or fewer; of
larger ones, one expert after the other is left out, always the one whose loss is least.

Where a router has groups, sets have as many experts of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from moebound.errors import UnsupportedArchitectureError
from moebound.integrations.transformers.router_edits import left_out
from moebound.model.calls import Pairs, arguments
from moebound.model.live import ExpertsModule
from moebound.model.routers import router_of
from moebound.model.taps import gets_decisions
from moebound.types import Array

MOST_ENUMERATED = 12
TOKENS = 512
"""So many tokens of the text are searched on: their experts' outputs are held, E x TOKENS x H."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One batch at one layer: how its block was called; what experts got, [T, H]; what each of them
    makes of every token, [E, T, H]; and the layer's output, [T, H]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: torch.Tensor
    whole: torch.Tensor


class _Done(Exception):
    """The experts have been reached: nothing behind them is needed."""


@dataclass
class Search:
    """Of one layer, while a text is read: `listen`, run the model, then `table`.

    groups, least: the router's, and how many of each have to be left.
    """

    model: nn.Module
    entry: ExpertsModule
    groups: int
    least: int

    def __post_init__(self) -> None:
        self._calls: list[_Call] = []
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        name = self.entry.stack.name
        router = router_of(self.model, name)
        if router is None or not gets_decisions(self.entry.module):
            raise UnsupportedArchitectureError(
                f"{name}: expected a router beside it, and experts that are called with "
                "(hidden_states, top_k_index, top_k_weights): no search in this family"
            )
        self._router: nn.Module = router
        self._block = self.model.get_submodule(name.rpartition(".")[0])

    @property
    def n_tokens(self) -> int:
        return sum(len(call.whole) for call in self._calls)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Keep what the layer is called with, until there are TOKENS tokens of it."""

        def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._given = args, kwargs

        def after(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            given, self._given = self._given, None
            if given is None or self.n_tokens >= TOKENS:
                return
            hidden, index, weights, *_ = arguments(args, kwargs)
            every = self._every(hidden.detach().reshape(-1, hidden.shape[-1]))
            whole = _added(every, index, weights)
            self._calls.append(_Call(*given, every, whole))

        with ExitStack() as hooks:
            for handle in (
                self._block.register_forward_pre_hook(before, with_kwargs=True),
                self.entry.module.register_forward_hook(after, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
            yield

    def _every(self, hidden: torch.Tensor) -> torch.Tensor:
        """[E, T, H]: what each expert makes of every token."""
        n, found = self.entry.stack.n_experts, []
        token = torch.arange(len(hidden), device=hidden.device)
        for expert in range(n):
            chosen = torch.full_like(token, expert)
            ones = torch.ones(len(hidden), dtype=hidden.dtype, device=hidden.device)
            found.append(Pairs(self.entry.stack, hidden, token, chosen, ones).outputs())
        return torch.stack(found)

    @torch.no_grad()
    def table(self) -> Array:
        """[E, E] uint8: row r - 1 has 1 for the experts of the best set of r; only zeros where no
        set of that size can be."""
        n = self.entry.stack.n_experts
        table = np.zeros((n, n), np.uint8)
        table[n - 1] = 1
        rounds = _enumerated if n <= MOST_ENUMERATED else _eliminated
        for kept in rounds(n, self.groups, self.least, self._loss):
            table[len(kept) - 1, list(kept)] = 1
        return table

    def _loss(self, kept: Sequence[int]) -> float:
        n = self.entry.stack.n_experts
        dropped = sorted(set(range(n)) - set(kept))
        total, module = 0.0, self.entry.module
        with left_out(self._router, dropped, n):
            for call in self._calls:
                found: list[torch.Tensor] = []

                def instead(*args: Any, call: _Call = call, **kwargs: Any) -> torch.Tensor:
                    _, index, weights, *_ = arguments(args, kwargs)
                    found.append(_added(call.outputs, index, weights))  # noqa: B023
                    raise _Done

                own, module.forward = module.forward, instead
                try:
                    self._block(*call.args, **call.kwargs)
                except _Done:
                    pass
                finally:
                    module.forward = own
                total += float((found[0] - call.whole).norm())
        return total


def _added(every: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, H]: the sum of the chosen experts' outputs. every: [E, T, H]."""
    index, weights = index.reshape(every.shape[1], -1), weights.reshape(every.shape[1], -1)
    token = torch.arange(every.shape[1], device=every.device)
    total = torch.zeros_like(every[0])
    for choice in range(index.shape[1]):
        total += every[index[:, choice], token] * weights[:, choice, None].to(total.dtype)
    return total


Loss = Callable[[Sequence[int]], float]


def _enumerated(n: int, groups: int, least: int, loss: Loss) -> Iterator[tuple[int, ...]]:
    """The best set of each size below n, of the first of equal ones."""
    size = n // groups
    for each in range(least, size):
        some = [
            kept
            for kept in combinations(range(n), each * groups)
            if all(sum(e // size == g for e in kept) == each for g in range(groups))
        ]
        yield min(some, key=lambda kept: (loss(kept), kept))


def _eliminated(n: int, groups: int, least: int, loss: Loss) -> Iterator[tuple[int, ...]]:
    """Greedily: in each round one of each group is left out."""
    size, kept = n // groups, list(range(n))
    for _ in range(least, size):
        for group in range(groups):
            own = [expert for expert in kept if expert // size == group]
            without = min(own, key=lambda e: (loss([k for k in kept if k != e]), e))
            kept.remove(without)
        yield tuple(kept)
