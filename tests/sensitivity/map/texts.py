"""Tiny models and texts of random tokens, small enough to try every expert by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moebound.evaluate.calibration import Calibration, calibration_of
from moebound.model.batched import NAME, register_batched
from moebound.score import Tokens
from tiny_models import tiny_model


def random_text(
    n: int = 6,
    *,
    seed: int = 0,
    longest: int = 14,
    vocabulary: int = 96,
    tokens: Tokens = "answers",
) -> Calibration:
    """n prompts with solutions, of different lengths. tokens: which count."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt, solution = (
            rng.integers(3, vocabulary, rng.integers(3, longest)).tolist() for _ in range(2)
        )
        rows.append((prompt, solution))
    return calibration_of(rows, tokens)


def sure_model(name: str, *, batched: bool = False) -> Any:
    """A random model whose experts and predictions are strong enough to be moved by an error."""
    model: Any = tiny_model(name, dtype=torch.float32)
    if name == "deepseek_v3":  # whose tiny config has fewer keys than its attention computes
        for layer in model.model.layers:
            layer.self_attn.num_key_value_groups = 1
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "expert" in key and parameter.dim() == 3:
                parameter.mul_(6.0)
        model.get_output_embeddings().weight.mul_(20.0)
        # As in a checkpoint: 16-bit values.
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    if batched:
        register_batched()
        model.set_experts_implementation(NAME)
    return model
