"""A checkpoint of DeepSeek-V3's architecture as a GGUF file, which is what llama.cpp reads.

Written as llama.cpp's own conversion does it (conversion/deepseek.py and base.py there, arch
`deepseek2`): the experts of a layer are one tensor a matrix [E, out, in]; `kv_b_proj` is split into
keys and values by head, keys transposed, for its attention in the compressed space; routers and
norms are float32, and all else has the dtype of the checkpoint. There is no tokenizer in it: it
takes and gives token ids. Only plain rotary embeddings, one group of experts, and queries without
a low rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebound.checkpoint import Checkpoint, TensorInfo, open_checkpoint, read_tensor
from moebound.errors import UnsupportedArchitectureError
from moebound.extras import need
from moebound.types import Array


@dataclass(frozen=True)
class _Tensor:
    """name, shape: in GGUF's order, outermost first. read: its values, when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]


def write_gguf(source: Path, file: Path) -> Path:
    """Write the checkpoint in folder `source` to `file`, if it is not there. Returns the file.

    One tensor at a time is in memory (of experts, one matrix of a whole layer). Raises
    UnsupportedArchitectureError for what is not written here, BackendUnavailable without gguf.
    """
    if file.exists():
        return file
    gguf = need("gguf", "writing GGUF")
    checkpoint = open_checkpoint(source)
    _check(checkpoint)
    tensors = list(_tensors(checkpoint, gguf))
    part = file.with_name(file.name + ".partial")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    _settings(writer, checkpoint.config, gguf)
    for tensor in tensors:
        *outer, last = tensor.shape
        raw = {2: gguf.GGMLQuantizationType.BF16, 4: gguf.GGMLQuantizationType.F32}
        size = tensor.dtype.itemsize
        writer.add_tensor_info(
            tensor.name, (*outer, last * size), np.dtype(np.uint8),
            int(np.prod(tensor.shape)) * size, raw_dtype=raw[size],
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        values = np.ascontiguousarray(tensor.read().astype(tensor.dtype, copy=False))
        writer.write_tensor_data(values.reshape(-1).view(np.uint8))
    writer.close()
    part.rename(file)
    return file


def _check(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    rope = config.get("rope_parameters") or {"rope_type": "default"}
    wanted = {
        "model_type": (config.get("model_type"), "deepseek_v3"),
        "q_lora_rank": (config.get("q_lora_rank"), None),
        "n_group": (config.get("n_group", 1), 1),
        "rope_interleave": (config.get("rope_interleave", True), True),
        "rope_scaling": (config.get("rope_scaling"), None),
        "rope_type": (rope.get("rope_type"), "default"),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            raise UnsupportedArchitectureError(
                f"{checkpoint.path}: not written as GGUF: expected {name} {expected!r}, found "
                f"{found!r}"
            )


def _settings(writer: Any, config: Any, gguf: Any) -> None:
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # attention in the compressed space: all heads share one key
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(rope)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(0)  # which llama.cpp asks for, unless a model has 26 or 27 layers
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_tokenizer_model("none")


def _tensors(checkpoint: Checkpoint, gguf: Any) -> Iterator[_Tensor]:
    config = checkpoint.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])

    def name_of(name: str) -> str:
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedArchitectureError(
                f"{checkpoint.path}: not written as GGUF: tensor {name!r} has no name there"
            )
        return str(found)

    for tensor in checkpoint.passthrough():
        if tensor.name.endswith("kv_b_proj.weight"):
            yield from _keys_and_values(tensor, config, name_of)
        elif tensor.name != "lm_head.weight" or not config.get("tie_word_embeddings"):
            plain = len(tensor.shape) == 1 or tensor.name.endswith("mlp.gate.weight")
            dtype = np.dtype(np.float32) if plain else _dtype(tensor)
            yield _Tensor(name_of(tensor.name), tensor.shape, dtype, _reader(tensor))
    layers = dict[int, list[Any]]()
    for expert in checkpoint.experts():
        layers.setdefault(expert.key.layer, []).append(expert)
    for layer, experts in layers.items():
        for place, first in enumerate(experts[0].matrices):
            matrices = [expert.matrices[place] for expert in experts]
            name = f"model.layers.{layer}.mlp.experts.{first.role}_proj.weight"
            yield _Tensor(
                name_of(name), (len(matrices), *first.shape), _dtype(first.source),
                _stack(checkpoint, matrices),
            )  # fmt: skip


def _keys_and_values(
    tensor: TensorInfo, config: Any, name_of: Callable[[str], str]
) -> Iterator[_Tensor]:
    heads, rank = config["num_attention_heads"], tensor.shape[-1]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]

    def by_head() -> Array:
        return read_tensor(tensor).reshape(heads, nope + value, rank)

    for part, shape, read in (
        ("k_b_proj", (heads, rank, nope), lambda: by_head()[:, :nope].transpose(0, 2, 1)),
        ("v_b_proj", (heads, value, rank), lambda: by_head()[:, nope:]),
    ):
        name = name_of(tensor.name.replace("kv_b_proj", part))
        yield _Tensor(name, shape, _dtype(tensor), read)


def _dtype(tensor: TensorInfo) -> np.dtype[Any]:
    import ml_dtypes

    known: dict[str, np.dtype[Any]] = {
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
    }
    if tensor.dtype not in known:
        raise UnsupportedArchitectureError(
            f"{tensor.file}: not written as GGUF: tensor {tensor.name!r}: expected BF16 or F32, "
            f"found {tensor.dtype}"
        )
    return known[tensor.dtype]


def _reader(tensor: TensorInfo) -> Callable[[], Array]:
    return lambda: read_tensor(tensor)


def _stack(checkpoint: Checkpoint, matrices: list[Any]) -> Callable[[], Array]:
    return lambda: np.stack([checkpoint.read(matrix) for matrix in matrices])
