"""A built-in model's kind and tokenizer, untrained: three layers, eight experts in a layer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moebound.wordmath.builtin import resolve


def untrained(folder: Path, model: str = "builtin:wordmath") -> Path:
    """Its checkpoint, made in `folder`. Weights large enough for errors to be felt.

    The first model's first layer is dense, the second's are all MoE layers.
    """
    built_in = Path(resolve(model))
    config: Any = AutoConfig.from_pretrained(built_in, num_hidden_layers=3)
    config.initializer_range = 2.4 / config.hidden_size**0.5  # products alike in any width
    if config.model_type == "deepseek_v3":
        config.n_routed_experts = 8
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    make(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built_in / name, folder)
    return folder
