"""What the experts of a layer compute on the way: their inputs, what their down projections get,
what they give; for every family whose layers `calls` can hear.

Whatever is computed here is compared once with what the module itself gave (`Inner.check`), so a
family that computes something else is refused, not measured wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moebound.errors import UnsupportedArchitectureError
from moebound.model.batched import Routed, one_by_one, sort_by_expert
from moebound.model.calls import Pairs, check_sum
from moebound.model.stacks import Stack


@dataclass(frozen=True, eq=False)
class Inner:
    """P pairs of a token and an expert, sorted by expert.

    routed: which are whose. token: [P]. weights g: [P]. inputs x: [P, H]. hidden: [P, I], what the
    down projection gets. outputs f(x): [P, H], before g. Where the family scales an expert's input
    and not its output (Llama 4), g is 1 and x is scaled.
    """

    routed: Routed
    token: torch.Tensor
    weights: torch.Tensor
    inputs: torch.Tensor
    hidden: torch.Tensor
    outputs: torch.Tensor

    def check(self, stack: Stack, given: torch.Tensor) -> None:
        """As `Pairs.check`, of what was computed here. given: [T, H]. To be asked of the pairs of
        all experts and tokens."""
        check_sum(stack, self.token, self.outputs.float() * self.weights.float()[:, None], given)


@torch.no_grad()
def inner(pairs: Pairs) -> Inner:
    """Compute the pairs again, keeping what is in between."""
    stack, module = pairs.stack, pairs.stack.module
    routed = sort_by_expert(pairs.expert, stack.n_experts)
    token = pairs.token[routed.order]
    if pairs.weights is None:
        n_tokens = len(pairs.inputs) // stack.n_experts
        rows = pairs.inputs[routed.experts * n_tokens + token]
        weights = torch.ones(len(token), device=rows.device)
    else:
        rows, weights = pairs.inputs[token], pairs.weights[routed.order]
    if not routed.used:
        width = stack.view("down", 0).shape[1]
        return Inner(routed, token, weights, rows, rows.new_zeros(0, width), rows)
    if hasattr(module, "has_gate") and hasattr(module, "_apply_gate"):
        hidden, outputs = one_by_one(module, rows, routed)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)  # type: ignore[operator]
    else:
        hidden, outputs = _by_views(stack, rows, routed)
    return Inner(routed, token, weights, rows, hidden, outputs)


def _by_views(
    stack: Stack, rows: torch.Tensor, routed: Routed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Families of their own make (JetMoe, DBRX, Llama 4): act(x Gᵀ) (x Uᵀ), then Dᵀ."""
    activate = _activation(stack)
    loads = [routed.loads[expert] for expert in routed.used]
    hidden, outputs = [], []
    for expert, part in zip(routed.used, torch.split(rows, loads), strict=True):
        up = part @ stack.view("up", expert).T
        inside = activate(part @ stack.view("gate", expert).T) * up if "gate" in stack.places \
            else activate(up)  # fmt: skip
        hidden.append(inside)
        outputs.append(inside @ stack.view("down", expert).T)
    return torch.cat(hidden), torch.cat(outputs)


def _activation(stack: Stack) -> torch.nn.Module:
    owners = (stack.module, getattr(stack.module, "mlp", None))
    for owner in owners:
        for name in ("act_fn", "activation", "activation_fn"):
            found = getattr(owner, name, None)
            if callable(found):
                return found  # type: ignore[no-any-return]
    raise UnsupportedArchitectureError(
        f"{stack.name}: no activation found (act_fn, activation or activation_fn): no statistics "
        "of this family"
    )
