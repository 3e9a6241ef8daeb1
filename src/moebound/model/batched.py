"""All experts of a layer in one matrix product a projection, for experts that are small.

transformers computes experts one after the other. For experts of a few thousand weights and a
handful of tokens that is mostly overhead: starting 64 products takes longer than computing them.
Here the tokens are sorted by expert, every expert's rows are padded to the longest, and one `bmm`
serves them all. Nothing is dropped (there is no capacity limit): padding is computed and not read,
so the result is that of the model's own implementation up to the order of float additions.

    register_batched()
    model.set_experts_implementation("moebound-batched")

Padding is computed too, so it must not cost more than the starts it saves. Each call counts both
and takes the cheaper way: together, or one expert after the other from the same sorted rows.
Gradients flow through both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NAME = "moebound-batched"
"""The value of `experts_implementation` that means `batched_experts`."""

START_WEIGHTS = 100_000
"""What starting one product costs on a CPU, in multiply-adds that it could have done instead
(2 to 3 µs at 40 Gigaflop/s a core: measured, and right within a factor of three elsewhere)."""

GPU_START_WEIGHTS = 50_000_000
"""The same where a launch takes as long and the arithmetic a few hundredths of the time."""


def register_batched() -> None:
    """Enter `batched_experts` into transformers' table under NAME. Idempotent."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, batched_experts)


def batched_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Σ over a token's experts of weight · expert(x).

    self: an experts module in transformers' fused layout; its `has_gate`, `has_bias`,
    `is_transposed` and `has_post_expert_norm` are honoured, and its own `_apply_gate` is used.
    hidden_states: [T, H]. top_k_index: [T, K], integers. top_k_weights: [T, K].
    Returns [T, H] in the dtype of hidden_states. Under expert parallelism, where indices may point
    outside of this module, transformers' own grouped product does the work.
    """
    if self._is_expert_parallel:
        from transformers.integrations.moe import grouped_mm_experts_forward

        whole: torch.Tensor = grouped_mm_experts_forward(
            self, hidden_states, top_k_index, top_k_weights
        )
        return whole
    n_tokens, n_chosen = top_k_index.shape
    routed = sort_by_expert(top_k_index.reshape(-1), self.num_experts)
    tokens = routed.order // n_chosen
    if _together_is_cheaper(self, routed):
        slots = routed.slots()
        size = len(routed.used) * routed.longest
        table = torch.zeros(size, dtype=torch.long, device=slots.device)
        table[slots] = tokens
        rows = hidden_states.index_select(0, table)
        outputs = _together(self, rows, routed)
    else:
        slots = torch.arange(len(tokens), device=tokens.device)
        _, outputs = one_by_one(self, hidden_states.index_select(0, tokens), routed)
    if getattr(self, "has_post_expert_norm", False):
        outputs = self.post_expert_norm(outputs)

    place = torch.empty_like(slots)
    place[routed.order] = slots
    found = outputs.index_select(0, place).view(n_tokens, n_chosen, -1)
    return (found * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


@dataclass(frozen=True, eq=False)
class Routed:
    """The (token, expert) pairs of a call, sorted by expert.

    order: [pairs], the pair that stands at each place. experts: [pairs], its expert.
    loads: pairs of each expert. used: experts with any, ascending.
    """

    order: torch.Tensor
    experts: torch.Tensor
    loads: list[int]
    used: list[int]

    @property
    def longest(self) -> int:
        return max(self.loads)

    def slots(self) -> torch.Tensor:
        """[pairs]: where each sorted pair stands in the padded table [used, longest], flattened."""
        shifts, start, row = [0] * len(self.loads), 0, 0
        for expert, load in enumerate(self.loads):
            shifts[expert] = row * self.longest - start
            start += load
            row += load > 0
        device = self.order.device
        shift = torch.tensor(shifts, device=device).index_select(0, self.experts)
        return shift + torch.arange(len(self.order), device=device)


def sort_by_expert(chosen: torch.Tensor, n_experts: int) -> Routed:
    """chosen: [pairs], the expert of each pair. Pairs of one expert keep their order."""
    loads = torch.bincount(chosen, minlength=n_experts).tolist()
    if chosen.device.type == "cpu" and n_experts <= 1 << 16:
        # NumPy sorts 16-bit integers by radix, fifteen times faster than torch sorts any.
        keys = chosen.numpy().astype(np.uint16)
        order = torch.from_numpy(keys.argsort(kind="stable"))
        experts = chosen.index_select(0, order)
    else:
        experts, order = torch.sort(chosen, stable=True)
    used = [expert for expert, load in enumerate(loads) if load]
    return Routed(order, experts, loads, used)


def _together_is_cheaper(self: Any, routed: Routed) -> bool:
    """Whether computing the padding costs less than starting a product an expert."""
    weights = self.down_proj.numel() // self.num_experts * (3 if self.has_gate else 2)
    padding = len(routed.used) * routed.longest - len(routed.order)
    # Where not all experts are used, those that are have to be copied out: a write and a read,
    # as costly as some ten multiply-adds a weight.
    copies = 10 * len(routed.used) if _copies(self, routed) else 0
    start = START_WEIGHTS if self.down_proj.device.type == "cpu" else GPU_START_WEIGHTS
    return bool((padding + copies) * weights < 2 * len(routed.used) * start)


def _copies(self: Any, routed: Routed) -> bool:
    return len(routed.used) < int(self.num_experts)


def _first(self: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The projection into the experts and its bias: gate and up together, or up alone."""
    name = "gate_up_proj" if self.has_gate else "up_proj"
    return getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None


def activate(self: Any, inner: torch.Tensor) -> torch.Tensor:
    activated: torch.Tensor = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    return activated


def _together(self: Any, rows: torch.Tensor, routed: Routed) -> torch.Tensor:
    """rows: [used · longest, H], padded. Returns the experts' outputs, of the same shape."""
    used = None
    if _copies(self, routed):
        used = torch.tensor(routed.used, device=rows.device)

    def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if used is not None:
            weight = weight.index_select(0, used)
            bias = None if bias is None else bias.index_select(0, used)
        if not self.is_transposed:
            weight = weight.transpose(1, 2)
        out = torch.bmm(x.view(len(routed.used), routed.longest, -1).to(weight.dtype), weight)
        return (out if bias is None else out + bias.unsqueeze(1)).flatten(0, 1)

    inner = activate(self, project(rows, *_first(self)))
    return project(inner, self.down_proj, self.down_proj_bias if self.has_bias else None)


def one_by_one(self: Any, rows: torch.Tensor, routed: Routed) -> tuple[torch.Tensor, torch.Tensor]:
    """rows: [pairs, H], sorted by expert. Returns what the down projections get, [pairs, I], and
    what they give, [pairs, H]."""
    inner = activate(self, into(self, rows, routed))
    return inner, out_of(self, inner, routed)


def into(self: Any, rows: torch.Tensor, routed: Routed) -> torch.Tensor:
    """What the projections into the experts give, gate and up or up alone: [pairs, 2I] or [pairs,
    I], in the order of the module's rows."""
    return _project(self, rows, routed, *_first(self))


def out_of(self: Any, inner: torch.Tensor, routed: Routed) -> torch.Tensor:
    """What the down projections give, [pairs, H]."""
    bias = self.down_proj_bias if self.has_bias else None
    return _project(self, inner, routed, self.down_proj, bias)


def _project(
    self: Any, x: torch.Tensor, routed: Routed, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    loads = [routed.loads[expert] for expert in routed.used]
    parts = []
    for expert, part in zip(routed.used, torch.split(x.to(weight.dtype), loads), strict=True):
        matrix = weight[expert] if self.is_transposed else weight[expert].t()
        out = torch.mm(part, matrix)
        parts.append(out if bias is None else out + bias[expert])
    return torch.cat(parts)
