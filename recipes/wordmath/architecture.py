"""The architectures that this recipe trains, and all that differs between them.

Each is one file: `config`, the forward pass `loss`, the names of its COMPILED parts, and what
`balance` does to the routers after a step. Problems, batches, optimizers, the loop, export and
evaluation are the same for both.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import attention
import deepseek
import mixtral
import routing

ARCHITECTURES: dict[str, ModuleType] = {"deepseek": deepseek, "mixtral": mixtral}


def new_model(config: Any) -> Any:
    """A model of that configuration in float32, with weights drawn from torch's generator."""
    untyped: Any = AutoModelForCausalLM
    return untyped.from_config(config, dtype=torch.float32)


def compile_parts(architecture: ModuleType) -> None:
    """Compile what lies between the products. Takes a minute, and needs a C++ compiler."""
    for name in architecture.COMPILED:
        setattr(architecture, name, torch.compile(getattr(architecture, name), dynamic=False))
    routing.experts = torch.compile(routing.experts, dynamic=False)
    attention.causal_softmax = torch.compile(attention.causal_softmax, dynamic=True)
