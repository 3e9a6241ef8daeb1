"""Muon for the matrices, AdamW for the rest.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest matrix whose singular
values are all about 1, found by five Newton-Schulz iterations. The scale of Moonlight (Liu et al.
2025), 0.2 * sqrt(larger side), makes an update as large as one of AdamW's, so both share a learning
rate. Every expert matrix is orthogonalised by itself, in batched products over all of one shape.

Embeddings, norms and routers (whose rows are experts' addresses, not a map) are AdamW's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """params: groups of 2-D matrices or 3-D stacks of them. `halves`: 2 where a matrix is two, one
    on the other (gate_up_proj)."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "halves": 1}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        work: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor, float]]] = defaultdict(
            list
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = torch.lerp(p.grad, buffer, group["momentum"])
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                rows = p.shape[-2] // group["halves"]
                shape = (-1, rows, p.shape[-1])
                work[shape[1:]].append((p.view(shape), update.view(shape), group["lr"]))
        for (rows, columns), items in work.items():
            whole = torch.cat([update for _, update, _ in items]).bfloat16()
            whole = orthogonalised(whole if rows <= columns else whole.mT)
            whole = whole if rows <= columns else whole.mT
            scale = 0.2 * max(rows, columns) ** 0.5
            parts = torch.split(whole, [len(p) for p, _, _ in items])
            for (p, _, lr), part in zip(items, parts, strict=True):
                p.add_(part, alpha=-lr * scale)


def orthogonalised(x: torch.Tensor) -> torch.Tensor:
    """[batch, m, n], m <= n: singular values become about 1 (0.7 to 1.2), vectors stay."""
    a, b, c = _NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    for _ in range(5):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def optimizers(model: torch.nn.Module, lr: float, kind: str) -> list[torch.optim.Optimizer]:
    """kind: `muon` (for matrices, with AdamW for the rest) or `adamw` (for all)."""
    matrices, stacks, rest = [], [], []
    for name, p in _named(model):
        if kind == "adamw" or p.ndim < 2 or "embed" in name or ".gate.weight" in name:
            rest.append(p)
        elif name.endswith("gate_up_proj"):
            stacks.append(p)
        else:
            matrices.append(p)
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if kind == "adamw":
        return [adamw]
    muon = Muon([{"params": matrices}, {"params": stacks, "halves": 2}], lr, weight_decay=0.01)
    return [muon, adamw]


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    yield from model.named_parameters()
