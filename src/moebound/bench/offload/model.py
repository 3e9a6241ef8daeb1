"""A synthetic checkpoint: DeepSeek-V3's architecture with the expert shapes of Moonlight-16B-A3B.

hidden 2048, intermediate 1408, 64 experts a layer, 6 of them a token, in bfloat16: 17.3 MB an
expert. All else is kept small, so that what is measured is experts. Weights are Gaussian with
scales of their own for rows and columns, as trained ones have; what the model says is noise.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moebound.checkpoint import ShardWriter, TensorSpec, open_checkpoint, write_index
from moebound.errors import CheckpointError
from moebound.store import compress
from moebound.store.format import Others
from moebound.types import Array, ErrorBound


@dataclass(frozen=True)
class Shapes:
    """layers with experts; one dense layer stands in front of them."""

    layers: int = 4
    experts: int = 64
    hidden: int = 2048
    intermediate: int = 1408
    top_k: int = 6
    vocab: int = 1024

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate


def make_checkpoint(folder: Path, shapes: Shapes, *, seed: int = 0) -> Path:
    """Write it, if it is not there. Returns the folder. Raises CheckpointError if one of other
    shapes is."""
    if (folder / "config.json").exists():
        _check_shapes(folder, shapes)
        return folder
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config: Any = DeepseekV3Config(  # type: ignore[call-arg]  # head_dim is one of its own
        vocab_size=shapes.vocab, hidden_size=shapes.hidden, intermediate_size=2 * shapes.hidden,
        moe_intermediate_size=shapes.intermediate, num_hidden_layers=shapes.layers + 1,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=shapes.experts,
        n_shared_experts=1, num_experts_per_tok=shapes.top_k, first_k_dense_replace=1, n_group=1,
        topk_group=1, kv_lora_rank=128, q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # The model's own weights without experts: a twin with a single, tiny expert a layer.
    torch.manual_seed(seed)
    small: Any = DeepseekV3Config(**{**config.to_dict(), "moe_intermediate_size": 8})
    model: Any = DeepseekV3ForCausalLM(small)
    model.to(torch.bfloat16)
    own = {k: v for k, v in model.state_dict().items() if ".experts." not in k}
    shared = _shared_experts(shapes, np.random.default_rng(seed))
    homes = dict[str, str]()
    names = [f"model-{i + 1:05}-of-{shapes.layers + 1:05}.safetensors"
             for i in range(shapes.layers + 1)]  # fmt: skip
    _write(part / names[0], {k: _bits(v) for k, v in own.items() if "shared_experts" not in k}
           | shared, homes)  # fmt: skip
    for layer in range(1, shapes.layers + 1):
        rng = np.random.default_rng([seed, layer])
        specs = [
            TensorSpec(_name(layer, e, role), "BF16", shape)
            for e in range(shapes.experts)
            for role, shape in _matrices(shapes).items()
        ]
        with ShardWriter(part / names[layer], specs) as shard:
            for spec in specs:
                data = _weights(rng, (spec.shape[0], spec.shape[1]))
                shard.write(spec.name, data.view(np.uint8).reshape(-1).data)
                homes[spec.name] = names[layer]
    write_index(part, homes, sum(file.stat().st_size for file in part.iterdir()))
    config.dtype = torch.bfloat16
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(part)
    part.rename(folder)
    return folder


def _check_shapes(folder: Path, shapes: Shapes) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = Shapes(
        layers=config["num_hidden_layers"] - 1, experts=config["n_routed_experts"],
        hidden=config["hidden_size"], intermediate=config["moe_intermediate_size"],
        top_k=config["num_experts_per_tok"], vocab=config["vocab_size"],
    )  # fmt: skip
    if found != shapes:
        raise CheckpointError(f"{folder}: is in the way: expected {shapes}, found {found}")


def make_store(
    checkpoint: Path, folder: Path, rate: float, codec: str = "bound", others: Others = "keep"
) -> Path:
    """The checkpoint's store at this rate, if it is not there. Returns the folder."""
    if not (folder / "config.json").exists():
        compress(open_checkpoint(checkpoint), folder, bound=ErrorBound(rate, "rate"), codec=codec,
                 others=others)  # fmt: skip
    return folder


def _matrices(shapes: Shapes) -> dict[str, tuple[int, int]]:
    H, I = shapes.hidden, shapes.intermediate  # noqa: E741
    return {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


def _name(layer: int, expert: int, role: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{role}.weight"


def _shared_experts(shapes: Shapes, rng: np.random.Generator) -> dict[str, Array]:
    return {
        f"model.layers.{layer}.mlp.shared_experts.{role}.weight": _weights(rng, shape)
        for layer in range(1, shapes.layers + 1)
        for role, shape in _matrices(shapes).items()
    }


def _weights(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    scale = np.exp(0.2 * rng.standard_normal((shape[0], 1), np.float32))
    scale = 0.02 * scale * np.exp(0.2 * rng.standard_normal((1, shape[1]), np.float32))
    weights: Array = (rng.standard_normal(shape, np.float32) * scale).astype(ml_dtypes.bfloat16)
    return weights


def _bits(tensor: object) -> Array:
    from moebound.codec import to_numpy

    return to_numpy(tensor)  # type: ignore[arg-type]


def _write(file: Path, tensors: dict[str, Array], homes: dict[str, str]) -> None:
    names = {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float32): "F32"}
    specs = [TensorSpec(n, names[a.dtype], a.shape) for n, a in tensors.items()]
    with ShardWriter(file, specs) as shard:
        for name, array in tensors.items():
            shard.write(name, np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
            homes[name] = file.name
