"""The built-in model's kind and tokenizer, untrained: two layers of eight experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moebound.wordmath.builtin import resolve


def untrained(folder: Path) -> Path:
    """Its checkpoint, made in `folder`. Weights large enough for errors to be felt."""
    built_in = Path(resolve("builtin:wordmath"))
    config = AutoConfig.from_pretrained(
        built_in, num_hidden_layers=3, n_routed_experts=8, initializer_range=0.3
    )
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    make(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built_in / name, folder)
    return folder
