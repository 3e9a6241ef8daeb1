"""Attention whose values are narrower than its keys, by torch's fused kernel on a CPU.

Multi-head latent attention (DeepSeek-V2 and what follows it, Moonlight among them) has keys of 192
numbers and values of 128. torch's fused kernel for CPUs asks for equal widths; otherwise it falls
back to single products and a softmax, which take several times as long, and more with every token
that the text has (docs/offload.md, "Where a token spends its time"). Zeros make values as wide as
keys, and outputs are cut again. The result differs from torch's own by float rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

NAME = "moebound-sdpa"
"""The value of `attn_implementation` that means `padded_attention`."""


LEAST_WIDTH = 64
"""Narrower keys take no time worth saving, and stay with torch's way."""


def register_attention() -> None:
    """Enter it into transformers' tables under NAME. Idempotent."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, padded_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def padded_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa`. query, key: [B, heads, T, D], value: [B, heads, T, at most D].
    Returns [B, T, heads, the value's width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    width = value.shape[-1]
    less = key.shape[-1] - width
    if less > 0:
        value = pad(value, (0, less))
    output, _ = sdpa_attention_forward(module, query, key, value, *args, **given)
    return output[..., :width].contiguous() if less > 0 else output, None


def fuse_attention(model: Any) -> bool:
    """Have a model on a CPU compute attention so, where that is of use: whether it does."""
    config = model.config.get_text_config(decoder=True)
    keys = sum(getattr(config, name, 0) or 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    if keys < LEAST_WIDTH or keys <= (getattr(config, "v_head_dim", None) or keys):
        return False
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        return False
    register_attention()
    model.set_attn_implementation(NAME)
    return bool(config._attn_implementation == NAME)
