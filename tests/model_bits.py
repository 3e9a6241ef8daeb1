"""Comparing models bit for bit, and tiny models that can really be run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tiny_models import model_class, tiny_config

# What is tiny on disk need not run: these tell their query heads from key heads, and in these a
# model of linear attention alone has no cache to ask for its length.
_CANNOT_RUN_TINY = {"glm4v_moe", "glm4v_moe_text", "glm5_next_text", "granitemoehybrid", "jamba",
                    "kimi_linear", "mistral4"}  # fmt: skip
CANNOT_GENERATE = {"mistral_large4_text", "muse_spark_text", "openai_privacy_filter"}


def runnable(names: Any) -> list[str]:
    return [name for name in sorted(names) if name not in _CANNOT_RUN_TINY]


def running_model(name: str, *, seed: int = 0) -> Any:
    """A tiny model in float32 whose forward pass works; its router is not all the same."""
    config = tiny_config(name)
    if getattr(config, "kv_lora_rank", None):  # one key head a query head, as those models have
        config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(seed)
    cls: Any = model_class(config)
    return cls._from_config(config, dtype=torch.float32).train(False)


def all_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, as its bytes."""
    return {name: as_bits(tensor) for name, tensor in model.state_dict().items()}


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().contiguous().view(torch.uint8)


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """Names of the tensors whose bits are other than before."""
    return {name for name, bits in all_bits(model).items() if not torch.equal(bits, before[name])}
