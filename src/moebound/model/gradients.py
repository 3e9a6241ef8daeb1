"""What the loss feels of the experts of a layer: its gradients at what their projections give.

From the gradient at the layer's output alone: an expert's share of that is g times what its down
projection gives, and what is in front of it is done again with the model's own weights, as
`inner.py` does, and gone through backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moebound.checkpoint import Role
from moebound.errors import UnsupportedArchitectureError
from moebound.model.batched import Routed, activate, into, out_of, sort_by_expert
from moebound.model.calls import Pairs
from moebound.model.stacks import Stack


@dataclass(frozen=True, eq=False)
class PairGradients:
    """P pairs of a token and an expert, sorted by expert.

    routed: which are whose. inputs x: [P, H]. hidden: [P, I], what the down projection gets.
    gradients: of the loss by what gate and up give [P, I], and by what down gives [P, H].
    """

    routed: Routed
    inputs: torch.Tensor
    hidden: torch.Tensor
    gradients: Mapping[Role, torch.Tensor]


def check_differentiable(stack: Stack) -> None:
    """Raises UnsupportedArchitectureError for families whose experts are computed in a way that
    `pair_gradients` does not know."""
    module = stack.module
    if not (hasattr(module, "has_gate") and hasattr(module, "_apply_gate")):
        raise UnsupportedArchitectureError(
            f"{stack.name}: its experts are not computed by transformers' experts functions, so "
            "gradients cannot be told apart by expert; leave --fisher out"
        )


def pair_gradients(pairs: Pairs, gradient: torch.Tensor) -> PairGradients:
    """gradient: [T, H], of the loss by the module's output, of each token of the batch."""
    stack, module = pairs.stack, pairs.stack.module
    check_differentiable(stack)
    if pairs.weights is None:
        raise UnsupportedArchitectureError(
            f"{stack.name}: its experts get their inputs scaled by the routing, and not their "
            "outputs; leave --fisher out"
        )
    routed = sort_by_expert(pairs.expert, stack.n_experts)
    token = pairs.token[routed.order]
    rows, weights = pairs.inputs[token], pairs.weights[routed.order]
    share = gradient[token] * weights[:, None].to(gradient.dtype)
    if not routed.used:
        empty = rows.new_zeros(0, stack.shape("down")[1])
        return PairGradients(routed, rows, empty, {role: empty if role != "down" else rows
                                          for role in stack.places})  # fmt: skip
    first = into(module, rows, routed).detach().requires_grad_()
    with torch.enable_grad():
        hidden = activate(module, first)
        given = out_of(module, hidden, routed)
        after = given
        if getattr(module, "has_post_expert_norm", False):
            after = module.post_expert_norm(given)  # type: ignore[operator]
        at_first, at_given = torch.autograd.grad(after, (first, given), share.to(after.dtype))
    gradients: dict[Role, torch.Tensor] = {
        role: at_first[:, _rows_of(stack, role, first.shape[1])]
        for role in stack.places if role != "down"
    }  # fmt: skip
    return PairGradients(routed, rows, hidden.detach(), gradients | {"down": at_given})


def _rows_of(stack: Stack, role: Role, n: int) -> torch.Tensor:
    """Which of the n channels of the first projection are a role's, in its own order."""
    place = stack.places[role]
    shape = stack.module.get_parameter(place.parameter).shape[1:]
    across = torch.arange(n)[:, None] if shape[0] == n else torch.arange(n)[None]
    return place.part(across.expand(1, *shape), 0)[:, 0]
