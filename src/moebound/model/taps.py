"""Where a layer's routing decision can be heard, for every family: which experts, what weights.

Nearly all experts modules of transformers are called as (hidden_states, top_k_index,
top_k_weights), whichever implementation computes them, so a hook before that call hears the final
decision: after groups, biases, normalisation and scaling. Two families are heard at their router
instead: Llama 4, whose experts all get every token, and JetMoe, whose experts get sorted rows.

Source: integrations/moe.py and the modeling files of transformers 5.23. `output_router_logits` is
not used: it gives logits, which some families do not choose by.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moebound.errors import UnsupportedArchitectureError
from moebound.model.calls import arguments
from moebound.model.routers import router_of
from moebound.model.stacks import Stack

Hear = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with top_k_index [T, K], integers, and top_k_weights [T, K], on the model's device."""


def tap(model: nn.Module, stack: Stack, hear: Hear) -> RemovableHandle:
    """Call `hear` with every routing decision of one experts module, from now on.

    Raises UnsupportedArchitectureError for a module whose decisions cannot be heard.
    """
    if gets_decisions(stack.module):
        return stack.module.register_forward_pre_hook(_before_experts(hear), with_kwargs=True)
    router = router_of(model, stack.name)
    if router is not None and isinstance(getattr(router, "top_k", None), int):
        return router.register_forward_hook(_after_router(stack, hear))
    raise UnsupportedArchitectureError(
        f"{stack.name}: its routing cannot be recorded; expected experts that are called with "
        "(hidden_states, top_k_index, top_k_weights), or a router beside them with a top_k"
    )


def gets_decisions(module: nn.Module) -> bool:
    """Whether an experts module is called as (hidden_states, top_k_index, top_k_weights)."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    positional = sum(
        kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for kind in kinds
    )
    # JetMoe's whole layer takes one argument, Llama 4's experts too.
    return positional >= 3 or inspect.Parameter.VAR_POSITIONAL in kinds


def _before_experts(hear: Hear) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, index, weights, *_ = arguments(args, kwargs)
        hear(index.detach(), weights.detach())

    return hook


def _after_router(stack: Stack, hear: Hear) -> Callable[[nn.Module, Any, Any], None]:
    def hook(router: nn.Module, _args: Any, output: Any) -> None:
        top_k = int(router.top_k)  # type: ignore[arg-type]  # tap() looked
        if isinstance(output, tuple) and len(output) == 5 and isinstance(output[3], list):
            hear(*_sorted_rows(output, top_k))
        elif isinstance(output, tuple) and len(output) == 2 and output[0].dim() == 2:
            # Llama 4: scores [T, E], 0 for all but the chosen.
            weights, index = output[0].detach().topk(top_k, dim=-1)
            hear(index, weights)
        else:
            raise UnsupportedArchitectureError(
                f"{stack.name}: {type(router).__name__} returned something unknown, expected "
                "(scores, logits) or (order, rows, weights, sizes, logits)"
            )

    return hook


def _sorted_rows(output: tuple[Any, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """JetMoe: (token, choice) pairs sorted by expert, put back into the order of the tokens."""
    order, _, gates, sizes, _ = output
    device = order.device
    experts = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device)
    )
    index, weights = torch.empty_like(order), torch.empty_like(gates)
    index[order] = experts
    weights[order] = gates
    return index.view(-1, top_k), weights.detach().view(-1, top_k)
