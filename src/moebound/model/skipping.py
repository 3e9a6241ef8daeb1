"""Experts that a token would be sent to and is not, while a model runs, whole or offloaded.

One mechanism for all policies (`skip_policies.py`): a hook in front of each experts module takes
away what the policy skips. Less is computed, and of a model whose experts are loaded when they are
needed, less is loaded. What that does to answers is to be measured (`moebound eval --skip`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moebound.errors import UnsupportedArchitectureError
from moebound.model.calls import arguments
from moebound.model.live import ExpertsModule, live_experts
from moebound.model.skip_policies import LuRe, Policy
from moebound.model.strands import current
from moebound.model.taps import gets_decisions

_NAMES = ("hidden_states", "top_k_index", "top_k_weights")

Count = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with a layer, the router's weights and what is skipped, both [P, K], of real tokens."""


@dataclass
class Skipped:
    """Pairs of a token and an expert it was sent to, without padding: all, and the skipped."""

    pairs: int = 0
    skipped: int = 0
    coarse: int = 0
    """Of those that are not skipped: computed with a coarser copy."""

    @property
    def share(self) -> float:
        return self.skipped / self.pairs if self.pairs else 0.0

    def add(self, _layer: int, weights: torch.Tensor, skipped: torch.Tensor) -> None:
        """As `Count`."""
        self.pairs += weights.numel()
        self.skipped += int(skipped.sum())

    def to_json(self, policy: str) -> dict[str, Any]:
        """With `coarse` where there are any."""
        found = {"policy": policy, "pairs": self.pairs, "skipped": self.skipped}
        return found | {"share": self.share} | ({"coarse": self.coarse} if self.coarse else {})


@contextmanager
def skipping(model: nn.Module, policy: Policy | Mapping[int, float]) -> Iterator[Skipped]:
    """Inside, a model skips experts; what is yielded counts them. Raises as `skip_in`.

    policy: or the thresholds of `lu_re` by decoder layer, of every layer with experts; at 0 nothing
    is skipped.
    """
    counts = Skipped()
    chosen = policy if isinstance(policy, Policy) else LuRe(policy)
    with skip_in(model, chosen, counts.add):
        yield counts


def skip_in(model: Any, policy: Policy, count: Count) -> ExitStack:
    """From now on, until what is returned is closed.

    Raises MoeboundError for a layer that the policy has no threshold of,
    UnsupportedArchitectureError for a family whose experts are not called with the router's weights
    or, where tokens are protected, whose attention cannot be read.
    """
    live = live_experts(model)
    for entry in live.stacks:
        if not gets_decisions(entry.module):
            raise UnsupportedArchitectureError(
                f"{entry.stack.name}: expected experts that are called with ({', '.join(_NAMES)}): "
                "which to skip cannot be said here"
            )
    policy.check_layers(live.layers)
    passes = _Passes()
    with ExitStack() as hooks:
        inner = getattr(model, "base_model", model)  # it has the mask, whoever calls it
        before = inner.register_forward_pre_hook(passes.begin, with_kwargs=True)
        hooks.callback(before.remove)
        if policy.protect:
            implementation = model.config._attn_implementation
            attentions = [_attention(model, entry.stack.name) for entry in live.stacks]
            model.set_attn_implementation("eager")
            hooks.callback(model.set_attn_implementation, implementation)
            for attention in attentions:
                hooks.callback(attention.register_forward_hook(passes.attended).remove)
        for entry in live.stacks:
            hook = _hook(entry, policy, passes, count)
            handle = entry.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        return hooks.pop_all()


@dataclass
class _Pass:
    """One forward pass under way. mask: [B, T or more], 1 for tokens, 0 for padding; None without.
    received: [B, T], what each token got of the attention of those behind it, in this layer."""

    mask: torch.Tensor | None = None
    received: torch.Tensor | None = None

    def real(self, n: int, device: torch.device) -> torch.Tensor:
        """[n] bool: which of the pass's tokens are no padding."""
        if self.mask is None or n % len(self.mask) or n // len(self.mask) > self.mask.shape[1]:
            return torch.ones(n, dtype=torch.bool, device=device)
        length = n // len(self.mask)
        return self.mask[:, self.mask.shape[1] - length :].reshape(-1).bool().to(device)


@dataclass
class _Passes:
    """What each strand, or who runs outside of any, is at: passes of strands are interleaved."""

    _of: WeakKeyDictionary[Any, _Pass] = field(default_factory=WeakKeyDictionary)
    _alone: _Pass = field(default_factory=_Pass)

    @property
    def now(self) -> _Pass:
        strand = current()
        return self._alone if strand is None else self._of.setdefault(strand, _Pass())

    def begin(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        two = isinstance(mask, torch.Tensor) and mask.dim() == 2
        self.now.mask, self.now.received = (mask if two else None), None

    def attended(self, module: nn.Module, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, torch.Tensor) or weights.dim() != 4:
            raise UnsupportedArchitectureError(
                f"{type(module).__name__}: gives no attention weights, by which tokens are "
                "protected; odp_re:protect0 protects none"
            )
        n_rows, n_tokens = weights.shape[0], weights.shape[2]
        real = self.now.real(n_rows * n_tokens, weights.device).view(n_rows, n_tokens).float()
        attention = weights.float().mean(1)[..., -n_tokens:]  # behind a cache: these tokens alone
        behind = real.flip(1).cumsum(1).flip(1)
        self.now.received = (attention * real.unsqueeze(2)).sum(1) / behind.clamp_min(1)


def _attention(model: nn.Module, experts: str) -> nn.Module:
    """The attention module of the decoder layer that these experts are in."""
    parts = experts.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found = getattr(model.get_submodule(".".join(parts[:end])), "self_attn", None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedArchitectureError(
        f"{experts}: no self_attn in its layer, whose weights say which tokens are protected; "
        "odp_re:protect0 protects none"
    )


def _hook(entry: ExpertsModule, policy: Policy, passes: _Passes, count: Count) -> Any:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, index, weights, *rest = arguments(args, kwargs)
        given, now = weights, passes.now
        skipped = policy.skips(entry.layer, weights)
        place = weights.argmax(dim=-1, keepdim=True)
        skipped = skipped.scatter(-1, place, False)
        rows = skipped.reshape(-1, skipped.shape[-1])
        real = now.real(len(rows), rows.device)
        if policy.protect:
            important = protected(hidden.reshape(len(rows), -1), now.received, real, policy.protect)
            skipped = skipped & ~important.reshape(*skipped.shape[:-1], 1)
            rows = skipped.reshape(rows.shape)
        count(entry.layer, given.reshape(rows.shape)[real], rows[real])
        index, weights = without(index, weights, skipped, rescale=policy.rescales)
        strand = current()
        if strand is None or not strand.joins:  # those who meet bring as many experts each
            most = int((~rows).sum(-1).max()) if len(rows) else rows.shape[1]
            index, weights = index[..., :most], weights[..., :most]
        others = {name: value for name, value in kwargs.items() if name not in _NAMES}
        return (hidden, index, weights, *rest), others

    return hook


def protected(
    hidden: torch.Tensor, received: torch.Tensor | None, real: torch.Tensor, share: float
) -> torch.Tensor:
    """[n] bool: the tokens of each sequence that matter most, floor(share · its tokens) of them.

    hidden: [n, H], of B sequences. received: [B, n / B]. real: [n], which are no padding."""
    found = torch.zeros_like(real)
    if received is None or received.numel() != len(real):
        return found
    importance = hidden.float().abs().sum(-1) * received.reshape(-1).to(hidden.device)
    importance = importance.masked_fill(~real, -torch.inf).view(received.shape)
    tokens = real.view(received.shape).sum(1).tolist()
    for row, n in enumerate(tokens):
        best = importance[row].topk(int(share * n)).indices
        found.view(received.shape)[row, best] = True
    return found


def without(
    index: torch.Tensor, weights: torch.Tensor, skipped: torch.Tensor, *, rescale: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """index, weights: [..., K], the router's. Those that are kept first, in their order; in the
    places behind them stands the token's first expert again, with a weight of 0, so that no other
    has to be there. rescale: to the sum of all weights."""
    largest = weights.argmax(dim=-1, keepdim=True)
    kept = weights.masked_fill(skipped, 0)
    if rescale:
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-20))
    index = torch.where(skipped, index.gather(-1, largest), index)
    order = skipped.to(torch.uint8).argsort(dim=-1, stable=True)
    return index.gather(-1, order), kept.gather(-1, order).to(weights.dtype)
