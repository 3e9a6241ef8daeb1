"""Mixtral, made small: its shape, and its forward pass for training on a few CPU cores.

Few wide experts, two of them for each token, chosen by a softmax router that is balanced by a term
of the loss, without shared experts and without a dense layer: what the first model is not. Rows are
of 256 weights, so the formats that people quantize to fit.

The same function of the same parameters as MixtralForCausalLM (a test compares them).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import MixtralConfig

import attention
import routing
from attention import mm, norm
from batches import Batch
from moebound.wordmath.tokenizer import BOS, EOS, PAD

BALANCE = 0.02  # weight of the balance loss, as in Mixtral 8x7B's configuration


def config(vocab_size: int, *, layers: int = 8, experts: int = 8) -> MixtralConfig:
    """The architecture. Fewer layers make the small model of the tests."""
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_local_experts=experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=BALANCE,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.02,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What training minimises: mean cross entropy over the solution tokens, plus BALANCE times the
    mean balance loss of the layers; the cross entropy alone; and the [experts] loads of each layer.
    """
    c = model.config
    angles = batch.positions[:, None, None].float() * model.model.rotary_emb.inv_freq
    cos, sin = angles.cos(), angles.sin()  # [n, 1, head_dim / 2]
    x = functional.embedding(batch.tokens, model.model.embed_tokens.weight)
    loads, balances = [], []
    for layer in model.model.layers:
        a = layer.self_attn
        qkv = _project(
            x,
            layer.input_layernorm.weight,
            a.q_proj.weight,
            a.k_proj.weight,
            a.v_proj.weight,
            cos,
            sin,
            c.num_attention_heads,
            c.rms_norm_eps,
        )
        mixed = attention.attend(qkv, batch, c.num_attention_heads, c.head_dim)
        mlp = layer.mlp
        x, h, scores = _before_experts(
            x,
            mixed,
            a.o_proj.weight,
            layer.post_attention_layernorm.weight,
            mlp.gate.weight,
            c.rms_norm_eps,
        )
        plan = routing.Plan(scores.detach(), c.num_experts_per_tok)
        loads.append(plan.load)
        balances.append(_balance_loss(scores, plan.load))
        rows = routing.gather(h, plan)
        outs = routing.experts(rows, mlp.experts.gate_up_proj, mlp.experts.down_proj)
        weights = _weights(scores, plan.chosen, plan.kept)
        x = x + routing.combine(outs, weights, plan)
    hidden = norm(x, model.model.norm.weight, c.rms_norm_eps)
    logits = mm(hidden.index_select(0, batch.solution), model.lm_head.weight)
    entropy = functional.cross_entropy(logits.float(), batch.targets)
    return entropy + BALANCE * torch.stack(balances).mean(), entropy, loads


def _balance_loss(scores: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's (2101.03961, section 2.2), with k choices a token: E times the sum over
    experts of the share of tokens that chose it and its mean score. k where all are alike."""
    return len(load) * (load / len(scores) * scores.mean(0)).sum()


# Between the gathers: pure functions of fixed shapes, compiled once for all layers


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).bfloat16()


def _project(
    x: torch.Tensor,
    scale: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
) -> torch.Tensor:
    """[n, 3 * heads * head_dim]: queries, and the keys and values that groups of them share."""
    n = len(x)
    width = q.shape[0] // heads
    h = norm(x, scale, eps)
    shared = heads * width // k.shape[0]
    queries = _rotate(mm(h, q).view(n, heads, width), cos, sin)
    keys = _rotate(mm(h, k).view(n, -1, width), cos, sin).repeat_interleave(shared, 1)
    values = mm(h, v).view(n, -1, width).repeat_interleave(shared, 1)
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
    return x, h.bfloat16(), functional.linear(h, router).softmax(-1)


def _weights(scores: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    weights = scores.gather(1, chosen)
    return weights / weights.sum(-1, keepdim=True) * kept


COMPILED = ("_project", "_before_experts", "_weights")


def balance(model: Any, loads: list[torch.Tensor], step: int) -> None:
    """Nothing: the balance is a term of the loss."""
