"""What an expert does with its tokens: projections, activation, biases, from what its slot holds.

Experts of few rows whose slots are of codes are computed together, since threads share the rows of
all of them, and one expert alone is hardly worth several threads. That changes no bit. Where the
gate is silu(gate) · up, without biases, as nearly all families have it, one call of the kernel
computes all of it, each row by itself, in one order. Else there are two calls, and between them the
module's own activation, a call of torch's for each expert, which may have other bits in another
shape.

Where a gradient is wanted, outputs are the kernel's all the same, and `backward` computes them once
more by operations that autograd sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from moebound.codec.codes import GatedExpert, Product, gated_experts, products
from moebound.model.few_rows import ROWS, flat, many, threads_for
from moebound.offload.slots import CodeSlot, Slot


class FewRows(NamedTuple):
    """An expert, what it is computed with, and for which rows: [n, H]."""

    expert: int
    slot: Slot
    rows: torch.Tensor


def few_rows_outputs(
    module: Any, experts: Sequence[FewRows], dtype: torch.dtype, threads: int
) -> torch.Tensor:
    """As `expert_output` of each, to the bit, one behind the other: [Σ n, H]. experts: at least
    one. threads: as many the kernel may use."""
    gated = gated_by_silu(module)
    able = few if gated else _few_for_products
    by_kernel = [
        in_codes(one.slot, dtype) and able(one.rows, dtype) and not wants_gradient(one.rows)
        for one in experts
    ]
    parts = iter(list[torch.Tensor]())
    if some := list(compress(experts, by_kernel)):
        call = gated_outputs if gated else partial(_of_codes, module)
        found = call(some, dtype, threads)
        if len(some) == len(experts):
            return found
        parts = iter(torch.split_with_sizes(found, [len(one.rows) for one in some]))
    return torch.cat([
        next(parts) if together else expert_output(module, one.expert, one.slot, one.rows, dtype)
        for one, together in zip(experts, by_kernel, strict=True)
    ])  # fmt: skip


def row_by_row(module: Any, slot: Slot, dtype: torch.dtype) -> bool:
    """Whether `gated_outputs` computes `few` rows of this expert: one of codes, with a gate that is
    silu(gate) · up, and without biases."""
    return in_codes(slot, dtype) and gated_by_silu(module)


def few(rows: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether rows [n, H] that stand by themselves are so few that the kernel computes them."""
    return not many(len(rows), dtype)


def _few_for_products(rows: torch.Tensor, dtype: torch.dtype) -> bool:
    """The same where the activation is torch's."""
    return len(rows) <= ROWS


def wants_gradient(rows: torch.Tensor) -> bool:
    return rows.requires_grad and torch.is_grad_enabled()


def in_codes(slot: Slot, dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies by what a slot holds."""
    return isinstance(slot, CodeSlot) and slot.kind.dtype == dtype


def gated_by_silu(module: Any) -> bool:
    """Whether an experts module's gate is silu(gate) · up, and there are no biases."""
    if not module.has_gate or module.has_bias or not module.is_concatenated:
        return False
    gate, activations = _known_gates()
    if type(module)._apply_gate is not gate or "_apply_gate" in vars(module):
        return False
    activation = module.act_fn
    if activation is silu:
        return True
    if type(activation) not in activations:
        return False
    return not (activation._forward_hooks or activation._forward_pre_hooks)


@cache
def _known_gates() -> tuple[Any, tuple[type, ...]]:
    """transformers' own gate, and the modules that are silu."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    return _default_apply_gate, (nn.SiLU, SiLUActivation)


def gated_outputs(
    experts: Sequence[FewRows], dtype: torch.dtype, threads: int, *, x: torch.Tensor | None = None
) -> torch.Tensor:
    """As `few_rows_outputs`, of experts that are computed `row_by_row`, by one call of the kernel.
    Of any number of rows each has, to the bit, what it has alone. x: the rows of all, one behind
    the other, for who has them."""
    one_input = x is None and all(one.rows is experts[0].rows for one in experts)  # a token's
    if x is None:
        x = experts[0].rows if one_input else torch.cat([one.rows for one in experts])
    x = x.detach().to(dtype)
    width, row = x.shape[1], 0
    jobs = list[GatedExpert]()
    for _, slot, rows in experts:
        assert isinstance(slot, CodeSlot)
        n, place = len(rows), row * width
        jobs.append(GatedExpert(*slot.gate_up_down(), 0 if one_input else place, n, place))
        row += n
    out = torch.empty((row, width), dtype=dtype)
    if threads > 1:
        threads = min(threads, threads_for(row * experts[0].slot.kind.n_weights))
    gated_experts(jobs, flat(x), flat(out), threads=threads)
    return out


def _of_codes(
    module: Any, experts: Sequence[FewRows], dtype: torch.dtype, threads: int
) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    slots = [one.slot for one in experts]
    inputs = [one.rows.to(dtype) for one in experts]
    inner = _project_all(slots, first, inputs, threads)
    if module.has_bias:
        inner = _biased(module, first, experts, inner)
    outputs = _project_all(slots, "down_proj", [activate(some) for some in inner], threads)
    return torch.cat(_biased(module, "down_proj", experts, outputs) if module.has_bias else outputs)


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
    if row_by_row(module, slot, dtype) and few(rows, dtype):
        one = FewRows(expert, slot, rows)
        if wants_gradient(rows):
            return _Recorded.apply(rows, module, one, dtype)  # type: ignore[no-any-return, no-untyped-call]
        return gated_outputs([one], dtype, torch.get_num_threads())
    return _by_operations(module, expert, slot, rows, dtype)


class _Recorded(torch.autograd.Function):
    """`gated_outputs` of one expert, recorded."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, module: Any, one: FewRows, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.given = module, one, dtype
        return gated_outputs([one], dtype, torch.get_num_threads())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        module, (expert, slot, _), dtype = ctx.given
        rows = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            outputs = _by_operations(module, expert, slot, rows, dtype)
        return (*torch.autograd.grad(outputs, rows, grads), None, None, None)


def _by_operations(
    module: Any, expert: int, slot: Slot, rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
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
