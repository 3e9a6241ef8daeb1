"""The shape of the built-in model: DeepSeek-V3's, made small.

As many layers, experts and chosen experts as the paper's DeepSeek-MoE-16B (27 layers of which the
first is dense, 64 routed experts, 6 of them for each token), so that its figures can be repeated
layer by layer; the widths are a thirtieth.
"""

from __future__ import annotations

from transformers import DeepseekV3Config

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
