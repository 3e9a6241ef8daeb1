"""Attention over sequences that lie one behind the other, and what every product shares.

Tokens of all sequences lie in one [n, hidden] matrix without padding; only attention lays them out
as rows. Products are in bfloat16. Every gather has a gather as its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from batches import Batch


def mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x.bfloat16(), weight.bfloat16())


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attend(qkv: torch.Tensor, batch: Batch, heads: int, width: int) -> torch.Tensor:
    """Causal attention inside each sequence. [n, heads * width]"""
    parts = []
    for group in batch.groups:
        rows, longest = group.gather.shape
        padded = _rows(qkv, group.gather, group.scatter)
        q, k, v = padded.view(rows, longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        mixed = torch.bmm(causal_softmax(scores, q.shape[-1] ** -0.5), v.flatten(0, 1)[..., :width])
        mixed = mixed.view(rows, heads, longest, width)
        flat = mixed.transpose(1, 2).reshape(rows * longest, heads * width)
        parts.append(_flat(flat, group.scatter))
    return torch.cat(parts)


def causal_softmax(scores: torch.Tensor, scale: float) -> torch.Tensor:
    n = scores.shape[-1]
    later = torch.arange(n)[None, :] > torch.arange(n)[:, None]
    return (scores.float() * scale).masked_fill(later, -torch.inf).softmax(-1).bfloat16()


class _Rows(torch.autograd.Function):
    """Tokens of a group, laid out as rows; padding repeats the first token and gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> Any:
        start = int(gather[0, 0])
        ctx.start, ctx.shape = start, x.shape
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather.flatten())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (scatter,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape)
        whole[ctx.start : ctx.start + len(scatter)] = grad.index_select(0, scatter)
        return whole, None, None


class _Flat(torch.autograd.Function):
    """Rows back to tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scatter: torch.Tensor) -> Any:
        ctx.shape = x.shape
        ctx.save_for_backward(scatter)
        return x.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (scatter,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape)
        whole[scatter] = grad
        return whole, None


# Typed as Any: torch leaves `apply` without types.
_rows: Any = _Rows.apply
_flat: Any = _Flat.apply
