"""Linear layers that read their weights once for one row each of several strands.

A product with one row takes as long as reading its weights; with eight rows it takes hardly longer.
So single rows of strands are computed together, up to ROWS at a time. A row's result has to be the
same to the bit whoever is beside it. Kernels choose their way by the number of rows, so
`least_rows` tries out, for each shape, from how many rows on every row is summed alike; fewer are
filled up with rows of zeros, for a sequence alone too. A shape of which that holds for no number is
computed row by row. So results may differ from those of a product with one row by float rounding.
Several rows of one strand (a prompt) are computed as ever, by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from moebound.model import few_rows
from moebound.model.code_linear import CodeLinear
from moebound.model.few_rows import NativeLinear
from moebound.model.strands import current, rows

ROWS = few_rows.ROWS
"""In bfloat16, on a processor of 2025, a product with so many rows takes 1.05 to 1.15 times as long
as with one."""

LEAST_WEIGHTS = 1 << 16
"""A layer, or an expert, of fewer weights is computed row by row: it takes no longer."""

_TRIES = 8
"""Of `least_rows`, of ROWS rows each: rounding to bfloat16 hides most of another order."""

_PROBE_BYTES = 64 << 20
"""Layers up to this size are tried out with weights of which nothing is hidden (`_probe`)."""

Compute = Callable[[torch.Tensor], torch.Tensor]
"""[n, in] to [n, out]."""


def least_rows(
    compute: Compute, width: int, *, dtype: torch.dtype, device: torch.device, tries: int = _TRIES
) -> int | None:
    """From how many rows on, up to ROWS, a row has the same result, to the bit, in each number of
    them, at every place and beside any others; None if not even of ROWS. Tried out with drawn
    numbers: kernels choose their way by shape, not by content."""
    generator = torch.Generator().manual_seed(0)
    least, half = 1, width // 2
    for _ in range(tries):
        rows = torch.randn((ROWS, width), generator=generator).to(device, dtype)
        rows[:, half : 2 * half] = rows[:, :half]  # for _probe
        wanted = compute(rows)
        for turn in range(1, ROWS):
            if not torch.equal(compute(rows.roll(turn, 0)), wanted.roll(turn, 0)):
                return None
        alone = torch.zeros_like(rows)
        alone[0] = rows[0]
        if not torch.equal(compute(alone)[0], wanted[0]):
            return None
        for n in range(ROWS - 1, least - 1, -1):
            whole = range(0, ROWS - n + 1, n)
            if not all(torch.equal(compute(rows[i : i + n]), wanted[i : i + n]) for i in whole):
                least = n + 1
                break
    return least


def _probe(module: nn.Linear) -> Compute:
    """A layer of the same shapes whose outputs, of rows with two equal halves, would be 0 without
    rounding: all that is left of them is the order of additions."""
    weight = module.weight
    if weight.numel() * weight.itemsize > _PROBE_BYTES:
        return module.forward  # it has outputs enough to show it
    half = weight.shape[1] // 2
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn((2, weight.shape[0], half), generator=generator)
    drawn = drawn[0] * drawn[1].exp()
    other = torch.zeros_like(weight)
    other[:, :half] = drawn.to(weight)
    other[:, half : 2 * half] = -other[:, :half]
    bias = None if module.bias is None else torch.zeros_like(module.bias)
    return lambda x: linear(x, other, bias)


def worth_joining(n_weights: int) -> bool:
    """Whether rows that so many weights are for are computed together."""
    return n_weights >= LEAST_WEIGHTS


def compute_rows(
    compute: Compute, rows: Sequence[torch.Tensor], least: int | None
) -> list[torch.Tensor]:
    """rows: [1, in] each, any number. least: as of `least_rows`. Returns [1, out] each, in memory
    of its own: kernels may choose their way by alignment too."""
    if least is None:
        return [compute(row) for row in rows]
    found = list[torch.Tensor]()
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        whole = some[0].new_zeros((max(len(some), least), some[0].shape[1]))
        torch.cat(list(some), out=whole[: len(some)])
        outputs = compute(whole)
        found += [outputs[i : i + 1].clone() for i in range(len(some))]
    return found


class Forwards:
    """Forward passes of modules that are replaced until `remove`."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    def __len__(self) -> int:
        return len(self._before)

    def put(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._before.append((module, vars(module).get("forward")))
        module.forward = forward

    def remove(self) -> None:
        for module, forward in reversed(self._before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._before.clear()


class JoinedLinears(Forwards):
    """Makes a model's linear layers meet, until `remove`. Those of experts that stay compressed are
    none. Nothing changes outside of strands."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        least = dict[tuple[Any, ...], int | None]()
        with torch.no_grad():
            for module in model.modules():
                if not isinstance(module, nn.Linear) or module.weight.is_meta:
                    continue
                if type(module) not in (nn.Linear, CodeLinear):
                    continue
                if not worth_joining(module.weight.numel()):
                    continue
                weight, biased = module.weight, module.bias is not None
                own = isinstance(module, CodeLinear) or (
                    isinstance(module.forward, NativeLinear) and module.forward.applies
                )
                shape = (*weight.shape, weight.dtype, weight.device, biased, own)
                if own:  # its order of sums is one and the same
                    least[shape] = 1
                elif shape not in least:
                    least[shape] = least_rows(
                        _probe(module), weight.shape[1], dtype=weight.dtype, device=weight.device,
                        tries=2,
                    )  # fmt: skip
                if (n := least[shape]) is not None:
                    self.put(module, partial(_forward, module, module.forward, n))


def _forward(module: nn.Linear, compute: Compute, least: int, x: torch.Tensor) -> torch.Tensor:
    strand = current()
    if (some := rows()) is not None and x.shape[-2] == len(some.owners):
        if isinstance(compute, NativeLinear) and compute.applies and len(some.owners) <= ROWS:
            return compute(x)
        split = compute_rows(compute, torch.split(x.reshape(-1, x.shape[-1]), 1), least)
        return torch.cat(split).view(*x.shape[:-1], -1)
    if strand is None or not strand.joins or x.numel() != module.in_features:
        return compute(x)
    row: torch.Tensor = strand.meet(
        module, x.reshape(1, -1), lambda rows: compute_rows(compute, rows, least)
    )
    return row.view(*x.shape[:-1], -1)
