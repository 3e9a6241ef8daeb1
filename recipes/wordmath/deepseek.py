"""DeepSeek-V3, made small: its shape, and its forward pass for training on a few CPU cores.

As many layers, experts and chosen experts as the paper's DeepSeek-MoE-16B (27 layers of which the
first is dense, 64 routed experts, 6 of them for each token), so that its figures can be repeated
layer by layer; the widths are a thirtieth.

The same function of the same parameters as DeepseekV3ForCausalLM (a test compares them), made fast
for a model this small: `attention.py` and `routing.py` say how.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from transformers import DeepseekV3Config

import attention
import routing
from attention import mm, norm
from batches import Batch
from moebound.wordmath.tokenizer import BOS, EOS, PAD


def config(vocab_size: int, *, layers: int = 27, experts: int = 64) -> DeepseekV3Config:
    """The architecture. Fewer layers and experts make the small model of the tests."""
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Mean cross entropy over the solution tokens; that, as nothing is added to it; and the
    [experts] loads of each MoE layer."""
    hidden, loads = _hidden(model, batch)
    kept = hidden.index_select(0, batch.solution)
    logits = mm(kept, model.lm_head.weight)
    entropy = functional.cross_entropy(logits.float(), batch.targets)
    return entropy, entropy, loads


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
        mixed = attention.attend(qkv, batch, c.num_attention_heads, c.v_head_dim)
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
            plan = routing.Plan(biased, c.num_experts_per_tok)
            loads.append(plan.load)
            rows = routing.gather(h, plan)
            outs = routing.experts(rows, mlp.experts.gate_up_proj, mlp.experts.down_proj)
            weights = _weights(scores, plan.chosen, plan.kept, c.routed_scaling_factor)
            routed = routing.combine(outs, weights, plan)
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
    return norm(x, model.model.norm.weight, c.rms_norm_eps), loads


# Between the gathers: pure functions of fixed shapes, compiled once for all layers


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).bfloat16()


def _project(
    x: torch.Tensor,
    scale: torch.Tensor,
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
    h = norm(x, scale, eps)
    queries = mm(h, q).view(n, heads, -1)
    compressed = mm(h, kv_a)
    rank = kv_norm.shape[0]
    kv = mm(norm(compressed[:, :rank], kv_norm, eps), kv_b).view(n, heads, -1)
    k_rope = _rotate(compressed[:, None, rank:], cos, sin).expand(-1, heads, -1)
    queries = torch.cat([queries[..., :nope], _rotate(queries[..., nope:], cos, sin)], -1)
    keys = torch.cat([kv[..., :nope], k_rope], -1)
    values = functional.pad(kv[..., nope:], (0, keys.shape[-1] - (kv.shape[-1] - nope)))
    return torch.cat([queries, keys, values], 1).view(n, -1)


def _before_experts(
    x: torch.Tensor,
    mixed: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    router: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x + mm(mixed, out)
    h = norm(x, scale, eps)
    return x, h.bfloat16(), functional.linear(h, router).sigmoid()


def _weights(
    scores: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    weights = scores.gather(1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale * kept


def _mlp(h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return mm(functional.silu(mm(h, gate).float()) * mm(h, up), down)


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
    scale: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    x = x + mm(mixed, out)
    return x + _mlp(norm(x, scale, eps), gate, up, down)


COMPILED = ("_project", "_before_experts", "_weights", "_after_experts")


def balance(model: Any, loads: list[torch.Tensor], step: int) -> None:
    """DeepSeek-V3's balancing without an auxiliary loss: an expert that had more than its share
    gets a lower bias, one that had less a higher. Fast while routers settle, then by 0.001."""
    speed = 1e-3 + 9e-3 * math.exp(-step / 150)
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    with torch.no_grad():
        for router, load in zip(routers, loads, strict=True):
            x = load.float()
            router.e_score_correction_bias += speed * torch.sign(x.mean() - x)
