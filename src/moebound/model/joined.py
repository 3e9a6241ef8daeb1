"""Linear layers that read their weights once for one row each of several strands.

A product with one row takes as long as reading its weights; with eight rows it takes hardly longer.
So single rows of strands are computed together, always as a matrix of ROWS rows, a sequence alone
too, its other rows zeros. A row's result then is the same to the bit whoever is beside it, if the
kernel sums every row in the same order: `rows_stay_apart` tries that out for each shape, and a
shape that fails is computed row by row. Results differ from those of a product with one row by
float rounding. Several rows of one strand (a prompt) are computed as ever, by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moebound.model.strands import current

ROWS = 8
"""In bfloat16, on a processor of 2025, a product with so many rows takes 1.05 to 1.15 times as long
as with one."""

LEAST_WEIGHTS = 1 << 16
"""A layer, or an expert, of fewer weights is computed row by row: it takes no longer."""

_TRIES = 4

Compute = Callable[[torch.Tensor], torch.Tensor]
"""[n, in] to [n, out]."""


def rows_stay_apart(
    compute: Compute, width: int, *, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether, of ROWS rows, each has the same result, to the bit, at every place and beside any
    others. Tried out with drawn numbers: kernels choose their way by shape, not by content."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> torch.Tensor:
        return torch.randn((n, width), generator=generator).to(device, dtype)

    for _ in range(_TRIES):
        row, others = drawn(1), drawn(ROWS)
        alone = torch.zeros_like(others)
        alone[0] = row
        wanted = compute(alone)[0]
        for place in range(ROWS):
            beside = others.clone()
            beside[place] = row
            if not torch.equal(compute(beside)[place], wanted):
                return False
    return True


def worth_joining(n_weights: int) -> bool:
    """Whether rows that so many weights are for are computed together."""
    return n_weights >= LEAST_WEIGHTS


def compute_rows(compute: Compute, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """rows: [1, in] each, any number. Returns [1, out] each, in memory of its own: kernels may
    choose their way by alignment too."""
    found = list[torch.Tensor]()
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        whole = some[0].new_zeros((ROWS, some[0].shape[1]))
        torch.cat(list(some), out=whole[: len(some)])
        outputs = compute(whole)
        found += [outputs[i : i + 1].clone() for i in range(len(some))]
    return found


class JoinedLinears:
    """Makes a model's linear layers meet, until `remove`. Those of experts that stay compressed are
    none. Nothing changes outside of strands."""

    def __init__(self, model: nn.Module) -> None:
        self._before: list[tuple[nn.Module, Any]] = []
        apart = dict[tuple[Any, ...], bool]()
        with torch.no_grad():
            for module in model.modules():
                if type(module) is not nn.Linear or module.weight.is_meta:
                    continue
                if not worth_joining(module.weight.numel()):
                    continue
                weight, biased = module.weight, module.bias is not None
                shape = (*weight.shape, weight.dtype, weight.device, biased)
                if shape not in apart:
                    apart[shape] = rows_stay_apart(
                        module.forward, weight.shape[1], dtype=weight.dtype, device=weight.device
                    )
                if apart[shape]:
                    self._before.append((module, vars(module).get("forward")))
                    joined = partial(_forward, module, module.forward)
                    module.forward = joined  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self._before)

    def remove(self) -> None:
        for module, forward in reversed(self._before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._before.clear()


def _forward(module: nn.Linear, compute: Compute, x: torch.Tensor) -> torch.Tensor:
    strand = current()
    if strand is None or not strand.joins or x.numel() != module.in_features:
        return compute(x)
    row: torch.Tensor = strand.meet(
        module, x.reshape(1, -1), lambda rows: compute_rows(compute, rows)
    )
    return row.view(*x.shape[:-1], -1)
