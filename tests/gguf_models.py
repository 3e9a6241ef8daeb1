"""GGUF files of tiny models, made by `gguf`'s own writer and quantizers.

Rows of queries and keys are permuted for architecture `llama`, as llama.cpp's conversion does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ARCHS = {"qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe", "mixtral": "llama"}


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """conversion/llama.py of llama.cpp."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write(
    folder: Path, file: Path, kind: str, tokens: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """Write the checkpoint in `folder` as GGUF, matrices quantized to `kind`. Returns what `gguf`
    dequantizes, cast to bfloat16, by the names of the checkpoint; of experts, [E, out, in]."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHS[config["model_type"]]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // heads)
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if tokens is None:
        writer.add_tokenizer_model("none")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(["a b", "ab c"])
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config["num_hidden_layers"]
    )
    quantization = gguf.GGMLQuantizationType[kind]
    truth = {}

    def add(name: str, stem: str, values: np.ndarray) -> np.ndarray:
        matrix = values.ndim > 1 and not re.search(r"gate(_inp)?$", stem)
        its = quantization if matrix else gguf.GGMLQuantizationType.F32
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[its][0]:  # as llama.cpp falls back
            its = gguf.GGMLQuantizationType.F16
        raw = _raw(values.astype(np.float32), its)
        writer.add_tensor(name, raw, raw_dtype=its)
        found: np.ndarray = gguf.quants.dequantize(raw, its)
        return found

    tensors: dict[str, Any] = {
        name: tensor.float().numpy()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        if found := re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)\.weight", name):
            experts.setdefault(f"{found[1][:-1]}{found[3]}", {})[int(found[2])] = values
            continue
        stem = name.removesuffix(".weight").removesuffix(".bias")
        stored = names.get_name(stem) + name[len(stem) :]
        shape = values.shape
        count = heads if ".q_proj" in name else kv if ".k_proj" in name else 0
        swap = arch == "llama" and count
        if "shared_expert_gate" in name:
            values = values.reshape(-1)
        found_values = add(stored, stem, permute(values, count) if swap else values)
        if swap:
            dim = shape[0] // count // 2
            found_values = found_values.reshape(count, dim, 2, *shape[1:]).swapaxes(1, 2)
        truth[name] = torch.from_numpy(found_values.reshape(shape).copy()).to(torch.bfloat16)
    for stem, by_index in experts.items():
        layer, leaf = re.search(r"layers\.(\d+)", stem)[1], stem.rsplit(".", 1)[1]  # type: ignore[index]
        part = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}.get(leaf, "down")
        stack = np.stack([by_index[index] for index in range(len(by_index))])
        found_values = add(f"blk.{layer}.ffn_{part}_exps.weight", f"{part}_exps", stack)
        for index in by_index:
            name = re.sub(r"experts", f"experts.{index}", stem) + ".weight"
            truth[name] = torch.from_numpy(found_values[index].copy()).to(torch.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def _raw(values: np.ndarray, kind: Any) -> np.ndarray:
    """Quantized by `gguf`; where it only dequantizes, bytes are drawn: small enough for scales."""
    import gguf

    try:
        found: np.ndarray = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        found = np.random.default_rng(values.size).integers(0, 64, shape, dtype=np.uint8)
    return found


Values = dict[str, np.ndarray]


def rewrite(
    file: Path,
    to: Path,
    *,
    keys: dict[str, Any] | None = None,
    change: Callable[[Values], Values] = lambda values: values,
    kind: str = "F32",
) -> Path:
    """Copy a file, dequantized, and changed.

    keys: new values, of the type that the file has for them or that they have; None leaves one out.
    kind: what matrices of experts are stored as, of whole blocks.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    keys = dict(keys or {})
    for name, found in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = keys.pop(name, found.contents())
        if value is not None:
            sub = found.types[-1] if len(found.types) > 1 else None
            writer.add_key_value(name, value, found.types[0], sub_type=sub)
    for name, value in keys.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    values: Values = {}
    for tensor in reader.tensors:
        shape = [int(side) for side in reversed(tensor.shape)]
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = plain.astype(np.float32).reshape(shape)
    for name, array in change(values).items():
        its = gguf.GGMLQuantizationType[kind if "_exps.weight" in name else "F32"]
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[its][0]:
            its = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, _raw(np.ascontiguousarray(array), its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
