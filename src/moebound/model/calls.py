"""One call of an experts module, taken apart into (token, expert) pairs that can be done again.

The module itself does them again, whatever its activation, biases and packing: called with one
expert a row, it gives each pair's share of the layer's output. That the shares add up to what the
module gave is checked (`check`), so a family that works otherwise is refused, not measured wrong.

Two ways of calling are known: (hidden_states, top_k_index, top_k_weights), nearly all families, and
Llama 4's, where every expert gets every token, scaled by its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moebound.errors import UnsupportedArchitectureError
from moebound.model.stacks import Stack

CHUNK_VALUES = 1 << 24
"""Pairs are computed in parts of about so many values."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of a token and an expert that it was sent to.

    token: [P], place of the token in its batch, row by row. expert: [P]. inputs: what the module
    got, [T, H], or [E · T, H] where weights is None (Llama 4). weights: [P], what the expert's
    output is multiplied by.
    """

    stack: Stack
    inputs: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    weights: torch.Tensor | None

    @torch.no_grad()
    def outputs(self) -> torch.Tensor:
        """Each pair's share of the layer's output, [P, H], with the weights of now."""
        module = self.stack.module
        if self.weights is None:
            n_tokens = len(self.inputs) // self.stack.n_experts
            whole: torch.Tensor = module(self.inputs)
            return whole[self.expert * n_tokens + self.token]
        size = max(1, CHUNK_VALUES // self.inputs.shape[-1])
        parts = []
        for start in range(0, len(self.token), size):
            some = slice(start, start + size)
            rows = self.inputs[self.token[some]]
            parts.append(module(rows, self.expert[some, None], self.weights[some, None]))
        return torch.cat(parts) if parts else self.inputs[:0]

    def where(self, keep: torch.Tensor) -> Pairs:
        """Some of them. keep: [P] bool."""
        weights = None if self.weights is None else self.weights[keep]
        return replace(self, token=self.token[keep], expert=self.expert[keep], weights=weights)

    def among(self, tokens: torch.Tensor) -> Pairs:
        """Those whose token counts. tokens: [T] bool."""
        return self.where(tokens[self.token])

    def check(self, output: torch.Tensor) -> None:
        """Raises UnsupportedArchitectureError unless all shares add up to the module's output."""
        check_sum(self.stack, self.token, self.outputs(), output)


def check_sum(
    stack: Stack, token: torch.Tensor, shares: torch.Tensor, output: torch.Tensor
) -> None:
    """Raises UnsupportedArchitectureError unless the shares of all pairs [P, H] add up to what the
    module gave, [T, H]. token: [P], whose each is."""
    shares = shares.float()
    total = torch.zeros(len(output), shares.shape[-1], device=shares.device)
    total.index_add_(0, token, shares)
    eps = torch.finfo(output.dtype).eps
    allowed = (64 * eps * output.float().abs().max()).clamp_min(1e-12)
    off = (total - output.float()).abs().max() if output.numel() else allowed * 0
    if not off <= allowed:
        raise UnsupportedArchitectureError(
            f"{stack.name}: its output is not the sum of its experts' outputs (off by "
            f"{float(off):g}): experts cannot be looked at one by one"
        )


Heard = Callable[[Pairs, torch.Tensor], torch.Tensor | None]
"""Called with all pairs of a call and its output [T, H]; may return another output."""
HeardEarly = Callable[[Pairs, torch.Tensor | None], None]


class Handles:
    """Of several hooks."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def listen_early(
    stack: Stack, n_tokens: Callable[[], int], heard: HeardEarly, early: Callable[[], bool]
) -> Handles:
    """As `listen`; where `early` says so, before the module computes anything, without an output.
    Who raises in it spares the module the work."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if early():
            heard(_pairs(stack, arguments(args, kwargs), n_tokens()), None)

    before = stack.module.register_forward_pre_hook(hook, with_kwargs=True)
    return Handles(before, listen(stack, n_tokens, heard))


def listen(stack: Stack, n_tokens: Callable[[], int], heard: Heard | HeardEarly) -> Any:
    """Be told of every call of an experts module until the handle is removed.

    n_tokens: of the batch that is running, padding included.
    """

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        given = arguments(args, kwargs)
        pairs = _pairs(stack, given, n_tokens())
        if not isinstance(output, torch.Tensor):
            raise _unknown(stack, given)
        rows = output.reshape(-1, n_tokens(), output.shape[-1])
        # Llama 4 adds up its experts' rows afterwards: what is added to the first is added to all.
        before = rows[0] if len(rows) == 1 else rows.sum(0)
        after = heard(pairs, before)
        if after is None:
            return None
        first = rows[0] + (after - before) if len(rows) > 1 else after
        return torch.cat([first[None], rows[1:]]).reshape(output.shape)

    return stack.module.register_forward_hook(hook, with_kwargs=True)


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What an experts module was called with, in order: by place, then by name."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    return [*args, *(kwargs[name] for name in names if name in kwargs)]


def _pairs(stack: Stack, given: list[Any], n_tokens: int) -> Pairs:
    if not given or not all(isinstance(part, torch.Tensor) for part in given[:3]):
        raise _unknown(stack, given)
    hidden = given[0].detach().reshape(-1, given[0].shape[-1])
    if len(given) >= 3 and len(hidden) == n_tokens and given[1].numel() == given[2].numel():
        index, weights = given[1].detach().reshape(n_tokens, -1), given[2].detach()
        token, choice = ((index >= 0) & (index < stack.n_experts)).nonzero(as_tuple=True)
        weights = weights.reshape(n_tokens, -1)[token, choice]
        return Pairs(stack, hidden, token, index[token, choice], weights)
    if len(given) == 1 and len(hidden) == stack.n_experts * n_tokens:
        expert, token = hidden.any(-1).view(stack.n_experts, n_tokens).nonzero(as_tuple=True)
        return Pairs(stack, hidden, token, expert, None)
    raise _unknown(stack, given)


def _unknown(stack: Stack, given: list[Any]) -> UnsupportedArchitectureError:
    found = ", ".join(
        str(tuple(part.shape)) if isinstance(part, torch.Tensor) else type(part).__name__
        for part in given
    )
    return UnsupportedArchitectureError(
        f"{stack.name}: called with ({found}), expected (hidden_states, top_k_index, "
        "top_k_weights): its experts cannot be looked at one by one"
    )
