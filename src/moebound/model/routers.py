"""The routers of a model, callable on their own: what a layer would choose for some input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moebound.checkpoint.families import ROUTERS

Router = Callable[[torch.Tensor], torch.Tensor]
"""[T, H], a layer's input to its experts -> [T, K], the experts it chooses."""


def find_routers(model: nn.Module, experts: dict[int, str], top_k: int) -> dict[int, Router]:
    """By decoder layer. experts: name of each layer's experts module. top_k: experts a token.

    Layers whose router cannot be found are left out; one that needs more than its input chooses
    none.
    """
    routers = {layer: router_of(model, name) for layer, name in experts.items()}
    return {layer: _callable(found, top_k) for layer, found in routers.items() if found is not None}


def router_of(model: nn.Module, experts: str) -> nn.Module | None:
    """The router of the experts module of that name: beside it, or (JetMoe) in it."""
    for place in (experts.rpartition(".")[0], experts):
        for name in ROUTERS:
            router = getattr(model.get_submodule(place), name, None)
            if isinstance(router, nn.Module):
                return router
    return None


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
