"""The model's forward pass, written for training it on a few CPU cores.

The same function of the same parameters as DeepseekV3ForCausalLM (a test compares them), made fast
for a model this small: tokens of all sequences lie in one [n, hidden] matrix without padding,
products are in bfloat16, all experts of a layer are one batched product, every gather has a gather
as its gradient, and what is left between products is compiled.

One thing differs: an expert takes at most CAPACITY times its fair share of tokens; what is more is
dropped. With balanced routing (`balance` in train.py) that is next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from batches import Batch

CAPACITY = 1.25


def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean cross entropy over the solution tokens, and the [experts] loads of each MoE layer."""
    hidden, loads = _hidden(model, batch)
    kept = hidden.index_select(0, batch.solution)
    logits = _mm(kept, model.lm_head.weight)
    return functional.cross_entropy(logits.float(), batch.targets), loads


def _hidden(model: Any, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    c = model.config
    rope = model.model.rotary_emb.inv_freq
    angles = batch.positions[:, None, None].float() * rope  # [n, 1, rope / 2]
    cos, sin = angles.cos(), angles.sin()
    x = functional.embedding(batch.tokens, model.model.embed_tokens.weight)
    loads = []
    for layer in model.model.layers:
        a = layer.self_attn
        qkv = _project(
            x,
            layer.input_layernorm.weight,
            a.q_proj.weight,
            a.kv_a_proj_with_mqa.weight,
            a.kv_a_layernorm.weight,
            a.kv_b_proj.weight,
            cos,
            sin,
            c.num_attention_heads,
            c.qk_nope_head_dim,
            c.rms_norm_eps,
        )
        mixed = _attend(qkv, batch, c.num_attention_heads, c.v_head_dim)
        mlp = layer.mlp
        if hasattr(mlp, "experts"):
            x, h, scores = _before_experts(
                x,
                mixed,
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                mlp.gate.weight,
                c.rms_norm_eps,
            )
            biased = scores.detach() + mlp.gate.e_score_correction_bias
            plan = _Plan(biased, c.num_experts_per_tok)
            loads.append(plan.load)
            rows = _gather(h, plan)
            outs = _experts(rows, mlp.experts.gate_up_proj, mlp.experts.down_proj)
            weights = _weights(scores, plan.chosen, plan.kept, c.routed_scaling_factor)
            routed = _combine(outs, weights, plan)
            s = mlp.shared_experts
            x = _after_experts(
                x, routed, h, s.gate_proj.weight, s.up_proj.weight, s.down_proj.weight
            )
        else:
            x = _dense(
                x,
                mixed,
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                mlp.gate_proj.weight,
                mlp.up_proj.weight,
                mlp.down_proj.weight,
                c.rms_norm_eps,
            )
    return _norm(x, model.model.norm.weight, c.rms_norm_eps), loads


# Between the gathers: pure functions of fixed shapes, compiled once for all layers


def _mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x.bfloat16(), weight.bfloat16())


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).bfloat16()


def _project(
    x: torch.Tensor,
    norm: torch.Tensor,
    q: torch.Tensor,
    kv_a: torch.Tensor,
    kv_norm: torch.Tensor,
    kv_b: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    nope: int,
    eps: float,
) -> torch.Tensor:
    """[n, 3 * heads * 32]: queries, keys and values (padded to the width of a key)."""
    n = len(x)
    h = _norm(x, norm, eps)
    queries = _mm(h, q).view(n, heads, -1)
    compressed = _mm(h, kv_a)
    rank = kv_norm.shape[0]
    kv = _mm(_norm(compressed[:, :rank], kv_norm, eps), kv_b).view(n, heads, -1)
    k_rope = _rotate(compressed[:, None, rank:], cos, sin).expand(-1, heads, -1)
    queries = torch.cat([queries[..., :nope], _rotate(queries[..., nope:], cos, sin)], -1)
    keys = torch.cat([kv[..., :nope], k_rope], -1)
    values = functional.pad(kv[..., nope:], (0, keys.shape[-1] - (kv.shape[-1] - nope)))
    return torch.cat([queries, keys, values], 1).view(n, -1)


def _causal_softmax(scores: torch.Tensor, scale: float) -> torch.Tensor:
    n = scores.shape[-1]
    later = torch.arange(n)[None, :] > torch.arange(n)[:, None]
    return (scores.float() * scale).masked_fill(later, -torch.inf).softmax(-1).bfloat16()


def _before_experts(
    x: torch.Tensor,
    mixed: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor,
    router: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x + _mm(mixed, out)
    h = _norm(x, norm, eps)
    return x, h.bfloat16(), functional.linear(h, router).sigmoid()


def _experts(rows: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    rows = rows.view(len(gate_up), -1, rows.shape[-1])
    gate, up = torch.bmm(rows, gate_up.bfloat16().transpose(1, 2)).chunk(2, -1)
    inner = (functional.silu(gate.float()) * up).bfloat16()
    return torch.bmm(inner, down.bfloat16().transpose(1, 2)).flatten(0, 1)


def _weights(
    scores: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    weights = scores.gather(1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale * kept


def _mlp(h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return _mm(functional.silu(_mm(h, gate).float()) * _mm(h, up), down)


def _after_experts(
    x: torch.Tensor,
    routed: torch.Tensor,
    h: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    return x + routed + _mlp(h, gate, up, down)


def _dense(
    x: torch.Tensor,
    mixed: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    x = x + _mm(mixed, out)
    return x + _mlp(_norm(x, norm, eps), gate, up, down)


def compile_parts() -> None:
    """Compile what lies between the products. Takes a minute, and needs a C++ compiler."""
    for name in ("_project", "_before_experts", "_experts", "_weights", "_after_experts"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)
    globals()["_causal_softmax"] = torch.compile(_causal_softmax, dynamic=True)


# Attention and routing: gathers, whose gradients are gathers


def _attend(qkv: torch.Tensor, batch: Batch, heads: int, width: int) -> torch.Tensor:
    """Causal attention inside each sequence. [n, heads * width]"""
    parts = []
    for group in batch.groups:
        rows, longest = group.gather.shape
        padded = _rows(qkv, group.gather, group.scatter)
        q, k, v = padded.view(rows, longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        mixed = torch.bmm(
            _causal_softmax(scores, q.shape[-1] ** -0.5), v.flatten(0, 1)[..., :width]
        )
        mixed = mixed.view(rows, heads, longest, width)
        flat = mixed.transpose(1, 2).reshape(rows * longest, heads * width)
        parts.append(_flat(flat, group.scatter))
    return torch.cat(parts)


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


class _Plan:
    """Which token goes to which expert's slots. pairs = n * k; slots = experts * capacity.

    chosen: [n, k]. kept: [n, k], false where an expert was full. slot_of_pair: [pairs], any slot
    where not kept. pair_of_slot: [slots], any pair where the slot is not `filled`. load: [experts],
    tokens that chose it.
    """

    def __init__(self, biased: torch.Tensor, k: int) -> None:
        n, experts = biased.shape
        self.chosen = torch.topk(biased, k, dim=-1, sorted=False)[1]
        flat = self.chosen.flatten()
        pairs = len(flat)
        capacity = int(CAPACITY * pairs / experts)
        slots = experts * capacity
        order = torch.from_numpy(flat.numpy().astype("uint8").argsort(kind="stable"))
        self.load = torch.bincount(flat, minlength=experts)
        start = torch.cumsum(self.load, 0) - self.load
        by_expert = flat.index_select(0, order)
        rank = torch.arange(pairs) - start.index_select(0, by_expert)
        fits = rank < capacity
        slot = torch.where(fits, by_expert * capacity + rank, slots)
        slot_of_pair = torch.empty_like(slot)
        slot_of_pair[order] = slot
        pair_of_slot = torch.full((slots + 1,), pairs)
        pair_of_slot[slot] = order
        self.kept = (slot_of_pair < slots).view(n, k)
        self.slot_of_pair = slot_of_pair.clamp(max=slots - 1)
        self.filled = pair_of_slot[:slots] < pairs
        self.pair_of_slot = pair_of_slot[:slots].clamp(max=pairs - 1)


class _Gather(torch.autograd.Function):
    """[n, hidden] -> [slots, hidden]. What an empty slot holds nobody reads."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, plan: _Plan) -> Any:
        ctx.plan = plan
        return h.index_select(0, plan.pair_of_slot // plan.chosen.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        plan = ctx.plan
        n, k = plan.chosen.shape
        found = grad.index_select(0, plan.slot_of_pair).view(n, k, -1)
        return torch.bmm(plan.kept.unsqueeze(1).to(grad.dtype), found).squeeze(1), None


class _Combine(torch.autograd.Function):
    """[slots, hidden] and weights [n, k], 0 where not kept -> [n, hidden], the weighted sums."""

    @staticmethod
    def forward(ctx: Any, outs: torch.Tensor, weights: torch.Tensor, plan: _Plan) -> Any:
        n, k = weights.shape
        found = outs.index_select(0, plan.slot_of_pair).view(n, k, -1)
        ctx.save_for_backward(found, weights)
        ctx.plan = plan
        return torch.bmm(weights.unsqueeze(1).to(found.dtype), found).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        found, weights = ctx.saved_tensors
        plan = ctx.plan
        grad = grad.to(found.dtype)
        grad_weights = torch.bmm(found, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        scale = weights.flatten().index_select(0, plan.pair_of_slot) * plan.filled
        grad_outs = grad.index_select(0, plan.pair_of_slot // weights.shape[1])
        return grad_outs * scale.to(grad.dtype).unsqueeze(1), grad_weights, None


# Typed as Any: torch leaves `apply` without types.
_rows: Any = _Rows.apply
_flat: Any = _Flat.apply
_gather: Any = _Gather.apply
_combine: Any = _Combine.apply
