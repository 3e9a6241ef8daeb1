"""Tokens to the slots of experts and back, in fixed shapes.

All experts of a layer are one batched product. An expert takes at most CAPACITY times its fair
share of a batch; what is more is dropped. With balanced routing that is next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

CAPACITY = 1.25


def experts(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    rows = rows.view(len(gate_up), -1, rows.shape[-1])
    gate, up = torch.bmm(rows, gate_up.bfloat16().transpose(1, 2)).chunk(2, -1)
    inner = (functional.silu(gate.float()) * up).bfloat16()
    return torch.bmm(inner, down.bfloat16().transpose(1, 2)).flatten(0, 1)


class Plan:
    """Which token goes to which expert's slots. pairs = n * k; slots = experts * capacity.

    chosen: [n, k]. kept: [n, k], false where an expert was full. slot_of_pair: [pairs], any slot
    where not kept. pair_of_slot: [slots], any pair where the slot is not `filled`. load: [experts],
    tokens that chose it.
    """

    def __init__(self, biased: torch.Tensor, k: int) -> None:
        n, experts = biased.shape
        self.chosen = torch.topk(biased, k, dim=-1, sorted=False)[1]
        flat = self.chosen.flatten()
        pairs = len(flat)
        capacity = int(CAPACITY * pairs / experts)
        slots = experts * capacity
        order = torch.from_numpy(flat.numpy().astype("uint8").argsort(kind="stable"))
        self.load = torch.bincount(flat, minlength=experts)
        start = torch.cumsum(self.load, 0) - self.load
        by_expert = flat.index_select(0, order)
        rank = torch.arange(pairs) - start.index_select(0, by_expert)
        fits = rank < capacity
        slot = torch.where(fits, by_expert * capacity + rank, slots)
        slot_of_pair = torch.empty_like(slot)
        slot_of_pair[order] = slot
        pair_of_slot = torch.full((slots + 1,), pairs)
        pair_of_slot[slot] = order
        self.kept = (slot_of_pair < slots).view(n, k)
        self.slot_of_pair = slot_of_pair.clamp(max=slots - 1)
        self.filled = pair_of_slot[:slots] < pairs
        self.pair_of_slot = pair_of_slot[:slots].clamp(max=pairs - 1)


def overflow(load: torch.Tensor) -> float:
    """The fraction of pairs of token and expert that found the expert full."""
    x = load.float()
    return float((x - CAPACITY * x.mean()).clamp(min=0).sum() / x.sum())


class _Gather(torch.autograd.Function):
    """[n, hidden] -> [slots, hidden]. What an empty slot holds nobody reads."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, plan: Plan) -> Any:
        ctx.plan = plan
        return h.index_select(0, plan.pair_of_slot // plan.chosen.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        plan = ctx.plan
        n, k = plan.chosen.shape
        found = grad.index_select(0, plan.slot_of_pair).view(n, k, -1)
        return torch.bmm(plan.kept.unsqueeze(1).to(grad.dtype), found).squeeze(1), None


class _Combine(torch.autograd.Function):
    """[slots, hidden] and weights [n, k], 0 where not kept -> [n, hidden], the weighted sums."""

    @staticmethod
    def forward(ctx: Any, outs: torch.Tensor, weights: torch.Tensor, plan: Plan) -> Any:
        n, k = weights.shape
        found = outs.index_select(0, plan.slot_of_pair).view(n, k, -1)
        ctx.save_for_backward(found, weights)
        ctx.plan = plan
        return torch.bmm(weights.unsqueeze(1).to(found.dtype), found).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        found, weights = ctx.saved_tensors
        plan = ctx.plan
        grad = grad.to(found.dtype)
        grad_weights = torch.bmm(found, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        scale = weights.flatten().index_select(0, plan.pair_of_slot) * plan.filled
        grad_outs = grad.index_select(0, plan.pair_of_slot // weights.shape[1])
        return grad_outs * scale.to(grad.dtype).unsqueeze(1), grad_weights, None


# Typed as Any: torch leaves `apply` without types.
gather: Any = _Gather.apply
combine: Any = _Combine.apply
