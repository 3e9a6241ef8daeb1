"""What the experts of a layer are computed with, and where their outputs wait to be added up.

A table has a row for each (token, expert) pair of one call of the experts function. It is filled in
any order and added up in the order of the router's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from moebound.model.batched import sort_by_expert


class Table(Protocol):
    def __len__(self) -> int:
        """How many tokens it is of."""
        ...

    def wants(self, expert: int) -> bool:
        """Whether any token has chosen it."""
        ...

    def rows(self, expert: int) -> torch.Tensor:
        """What a wanted one is computed with: [n, H], the tokens in order."""
        ...

    def put(self, expert: int, outputs: torch.Tensor | None) -> None:
        """What comes of it: [n, H]; None for nothing."""
        ...

    def total(self) -> torch.Tensor:
        """The sum of all, [T, H]."""
        ...


def table_of(
    module: Any,
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    shared: Shared | None = None,
) -> Table:
    """Of a call with x [T, H], chosen and weights [T, K]. shared: for one token's outputs."""
    if len(x) == 1:
        return OneToken(module, x, chosen, weights, shared)
    return ManyTokens(module, x, chosen, weights)


class Shared:
    """Where one-token tables of several calls of one module have their outputs, one behind the
    other. calls: so many, of [1, H] like x and [1, K] like chosen."""

    def __init__(self, x: torch.Tensor, chosen: torch.Tensor, calls: int) -> None:
        self._outputs = x.new_zeros((calls * chosen.shape[1], x.shape[1]))
        self._taken = 0

    def take(self, n: int) -> tuple[torch.Tensor, int]:
        """The next n rows, and the place of the first."""
        first, self._taken = self._taken, self._taken + n
        return self._outputs[first : self._taken], first

    def put(self, rows: Sequence[tuple[OneToken, int]], outputs: torch.Tensor) -> None:
        """What comes of an expert for a table, a row for each of these."""
        places = [table.first + table.place(expert) for table, expert in rows]
        self._outputs[places] = outputs.to(self._outputs.dtype)


class OneToken:
    """Each expert has one row, and nothing is to be sorted. first: place of the first output in
    what is shared."""

    def __init__(
        self,
        module: Any,
        x: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        shared: Shared | None = None,
    ) -> None:
        self._module, self._x, self._weights = module, x, weights
        # Where the token has an expert, the first time.
        self._places = dict[int, int]()
        for place, expert in enumerate(chosen[0].tolist()):
            self._places.setdefault(expert, place)
        shared = Shared(x, chosen, 1) if shared is None else shared
        self._outputs, self.first = shared.take(chosen.shape[1])

    def __len__(self) -> int:
        return 1

    def wants(self, expert: int) -> bool:
        return expert in self._places

    def rows(self, expert: int) -> torch.Tensor:
        return self._x

    def put(self, expert: int, outputs: torch.Tensor | None) -> None:
        self._outputs[self._places[expert]] = 0 if outputs is None else outputs[0]

    def place(self, expert: int) -> int:
        return self._places[expert]

    def put_each(self, experts: Sequence[int], outputs: torch.Tensor) -> None:
        """Of several, a row for each. Nothing is copied where all come, in the order of places."""
        places = [self._places[expert] for expert in experts]
        outputs = outputs.to(self._outputs.dtype)
        if places == [*range(len(self._outputs))]:
            self._outputs = outputs
        else:
            self._outputs[places] = outputs

    def total(self) -> torch.Tensor:
        weighed = _normed(self._module, self._outputs) * self._weights[0].unsqueeze(-1)
        return weighed.sum(0, keepdim=True).to(self._x.dtype)


class ManyTokens:
    """The pairs are sorted by expert."""

    def __init__(
        self, module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self._module, self._weights = module, weights
        n_chosen = chosen.shape[1]
        self._routed = sort_by_expert(chosen.reshape(-1), module.num_experts)
        self._ends = list(accumulate(self._routed.loads))
        self._rows = x.index_select(0, self._routed.order // n_chosen)
        self._outputs = torch.empty((len(self._rows), x.shape[1]), dtype=x.dtype, device=x.device)

    def __len__(self) -> int:
        return len(self._weights)

    def wants(self, expert: int) -> bool:
        return self._routed.loads[expert] > 0

    def rows(self, expert: int) -> torch.Tensor:
        return self._rows[self._part(expert)]

    def put(self, expert: int, outputs: torch.Tensor | None) -> None:
        self._outputs[self._part(expert)] = 0 if outputs is None else outputs

    def total(self) -> torch.Tensor:
        normed = _normed(self._module, self._outputs)
        order = self._routed.order
        place = torch.empty_like(order)
        place[order] = torch.arange(len(place), device=place.device)
        found = normed.index_select(0, place).view(*self._weights.shape, -1)
        return (found * self._weights.unsqueeze(-1)).sum(1).to(self._rows.dtype)

    def _part(self, expert: int) -> slice:
        return slice(self._ends[expert] - self._routed.loads[expert], self._ends[expert])


def _normed(module: Any, outputs: torch.Tensor) -> torch.Tensor:
    if getattr(module, "has_post_expert_norm", False):
        normed: torch.Tensor = module.post_expert_norm(outputs)
        return normed
    return outputs
