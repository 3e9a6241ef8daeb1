"""What an expert does with its tokens: projections, activation, biases, from what its slot holds.

Experts of few rows whose slots are of codes are computed together: all that are there by two calls
of the kernel, whose rows the threads share, since one expert alone is hardly worth several threads.
That changes no bit: a row's products depend on nothing but the row, and each expert's activation is
a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from moebound.codec.codes import Product, products
from moebound.model.few_rows import ROWS, flat
from moebound.offload.slots import CodeSlot, Slot


class FewRows(NamedTuple):
    """An expert, what it is computed with, and for which rows: [n, H]."""

    expert: int
    slot: Slot
    rows: torch.Tensor


def few_rows_outputs(
    module: Any, experts: Sequence[FewRows], dtype: torch.dtype, threads: int
) -> list[torch.Tensor]:
    """As `expert_output` of each, to the bit. threads: as many the kernel may use."""
    found = list[torch.Tensor | None]([None] * len(experts))
    together = [i for i, one in enumerate(experts) if _by_kernel(one, dtype)]
    if together:
        outputs = _of_codes(module, [experts[i] for i in together], dtype, threads)
        for i, output in zip(together, outputs, strict=True):
            found[i] = output
    return [
        expert_output(module, one.expert, one.slot, one.rows, dtype) if output is None else output
        for one, output in zip(experts, found, strict=True)
    ]


def _by_kernel(one: FewRows, dtype: torch.dtype) -> bool:
    return (
        isinstance(one.slot, CodeSlot)
        and one.slot.kind.dtype == dtype
        and one.rows.shape[0] <= ROWS
        and not (torch.is_grad_enabled() and one.rows.requires_grad)
    )


def _of_codes(
    module: Any, experts: Sequence[FewRows], dtype: torch.dtype, threads: int
) -> list[torch.Tensor]:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    slots = [one.slot for one in experts]
    inputs = [one.rows.to(dtype) for one in experts]
    inner = _project_all(slots, first, inputs, threads)
    if module.has_bias:
        inner = _biased(module, first, experts, inner)
    outputs = _project_all(slots, "down_proj", [activate(some) for some in inner], threads)
    return _biased(module, "down_proj", experts, outputs) if module.has_bias else outputs


def _biased(
    module: Any, name: str, experts: Sequence[FewRows], found: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    bias = getattr(module, f"{name}_bias")
    return [some + bias[one.expert] for one, some in zip(experts, found, strict=True)]


def _project_all(
    slots: Sequence[Slot], name: str, inputs: Sequence[torch.Tensor], threads: int
) -> list[torch.Tensor]:
    """Of each slot the product of this parameter with its own input, [n, in] to [n, out]."""
    if all(x is inputs[0] for x in inputs):  # one token's experts
        x, step = inputs[0].detach(), 0
    else:
        x, step = torch.cat([some.detach() for some in inputs]), 1
    out_rows, width = slots[0].kind.shape_of(name)
    counts = [some.shape[0] for some in inputs]
    out = torch.empty((sum(counts), out_rows), dtype=x.dtype)
    jobs, row = list[Product](), 0
    for slot, n in zip(slots, counts, strict=True):
        assert isinstance(slot, CodeSlot)
        for of, matrix in slot.parts_of(name):
            jobs.append(Product(matrix, step * row * width, n, row * out_rows + of, out_rows))
        row += n
    products(jobs, flat(x), flat(out), threads=threads)
    return list(torch.split_with_sizes(out, counts))


def expert_output(
    module: Any, expert: int, slot: Slot, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """One expert's output for its tokens. rows: [n, H]. dtype: to compute in.
    Returns [n, H]."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _project(module, rows, slot, first, expert, dtype)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return _project(module, inner, slot, "down_proj", expert, dtype)


def _project(
    module: Any,
    x: torch.Tensor,
    slot: Slot,
    name: str,
    expert: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if dtype == slot.kind.dtype:
        out = slot.project(name, x.to(dtype))
    else:  # a model that was cast
        weight = slot.decoded()[name].to(dtype)
        out = linear(x.to(dtype), weight.t() if module.is_transposed else weight)
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out
