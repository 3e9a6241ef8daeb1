"""The routers of a model, callable on their own: what a layer would choose for some input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Router = Callable[[torch.Tensor], torch.Tensor]
"""[T, H], a layer's input to its experts -> [T, K], the experts it chooses."""

_NAMES = ("gate", "router")


def find_routers(model: nn.Module, experts: dict[int, str]) -> dict[int, Router]:
    """By decoder layer. experts: name of each layer's experts module; its router stands beside it.

    Layers whose router cannot be found, or needs more than its input, are left out.
    """
    found = dict[int, Router]()
    for layer, name in experts.items():
        router, block = router_of(model, name), model.get_submodule(name.rpartition(".")[0])
        if router is not None:
            top_k = int(getattr(router, "top_k", 0) or getattr(block, "top_k", 0) or 0)
            found[layer] = _callable(router, top_k)
    return found


def router_of(model: nn.Module, experts: str) -> nn.Module | None:
    """The router that stands beside an experts module of that name; None where none is known."""
    block = model.get_submodule(experts.rpartition(".")[0])
    router = next((getattr(block, n) for n in _NAMES if hasattr(block, n)), None)
    return router if isinstance(router, nn.Module) else None


def _callable(router: nn.Module, top_k: int) -> Router:
    def choose(x: torch.Tensor) -> torch.Tensor:
        try:
            out: Any = router(x)
        except (TypeError, RuntimeError, ValueError, AttributeError):
            return torch.empty((len(x), 0), dtype=torch.long)
        parts = out if isinstance(out, tuple) else (out,)
        for part in parts:  # transformers 5.23: logits, weights, indices
            if not part.is_floating_point() and part.dim() == 2:
                found: torch.Tensor = part
                return found
        logits: torch.Tensor = parts[0].reshape(len(x), -1)
        return logits.topk(min(top_k, logits.shape[-1]), -1).indices

    return choose
