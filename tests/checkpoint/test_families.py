"""Every architecture, as transformers itself writes it: the experts found are the model's."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from model_bits import runnable, running_model
from moebound.checkpoint import (
    FAMILIES,
    SUPPORTED,
    Expert,
    find_family,
    open_checkpoint,
    read_json,
    top_k_of,
)
from moebound.errors import UnsupportedArchitectureError
from moebound.model import live_experts
from moebound.model.routers import router_of
from moebound.model.taps import tap
from tiny_models import TINY, MakeTiny, model_class, tiny_model

# Where transformers' parameters are, whatever the family: [E, ...] per layer.
PARAMETER = re.compile(
    r"layers\.(\d+)\.(?!self_attention)(?:\w+\.)*"
    r"(gate_up_proj|down_proj|up_proj|input_linear\.weight|output_linear\.weight)"
)
NAMES = {
    "gate_up_proj": "in",
    "up_proj": "in",
    "input_linear.weight": "in",
    "down_proj": "out",
    "output_linear.weight": "out",
}

# Families that exist in released checkpoints and that transformers can write. Fused as well, for
# those where it writes one tensor per expert.
FUSED_TOO = ["deepseek_v3", "granitemoe", "jamba", "lfm2_moe", "mixtral", "nemotron_h", "qwen3_moe"]

TINY_TOP_K = {"zaya": 1}  # 2 in all others


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def model_experts(folder: Path) -> dict[tuple[int, int, str], np.ndarray[Any, Any]]:
    """(layer, expert, "in" or "out") -> matrix, out of the parameters of the model as loaded."""
    result: dict[tuple[int, int, str], np.ndarray[Any, Any]] = {}
    counts: dict[tuple[int, str], int] = defaultdict(int)
    config = AutoConfig.from_pretrained(folder)
    model = model_class(config).from_pretrained(folder, dtype="auto")
    for key, tensor in model.state_dict().items():
        found = PARAMETER.search(key)
        if not found or found.end() != len(key) or tensor.dim() != 3 or "shared" in key:
            continue
        layer, side = int(found[1]), NAMES[found[2]]
        for matrix in as_array(tensor):
            result[layer, counts[layer, side], side] = matrix
            counts[layer, side] += 1
    return result


def in_module_layout(name: str, expert: Expert, read: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What transformers makes of an expert's stored matrices when it loads them."""
    parts = {matrix.role: read(matrix) for matrix in expert.matrices}
    if "gate_up" in parts:
        entry = parts["gate_up"]
    elif "gate" in parts:
        entry = np.concatenate([parts["gate"], parts["up"]])
    else:
        entry = parts["up"]
    result = {"in": entry, "out": parts["down"]}
    if name == "inkling2_text":  # gate and up rows alternate on disk
        result["in"] = np.concatenate([entry[0::2], entry[1::2]])
    return result


def assert_same_experts(name: str, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    expected = model_experts(folder)
    experts = checkpoint.experts()
    assert [expert.key for expert in experts] == sorted(expert.key for expert in experts)
    assert {(e.key.layer, e.key.expert) for e in experts} == {key[:2] for key in expected}
    for expert in experts:
        for side, matrix in in_module_layout(name, expert, checkpoint.read).items():
            want = expected[expert.key.layer, expert.key.expert, side]
            assert matrix.shape == want.shape
            assert matrix.dtype == want.dtype
            np.testing.assert_array_equal(matrix.view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("name", sorted(TINY))
def test_experts_are_the_models_own(name: str, tiny: MakeTiny) -> None:
    assert_same_experts(name, tiny(name))


def test_qwen3_vl_as_released_is_transposed(tiny: MakeTiny, tmp_path: Path) -> None:
    saved = tiny("qwen3_vl_moe")
    shutil.copy(saved / "config.json", tmp_path)
    save_file(
        {
            key: tensor.transpose(1, 2).contiguous() if ".experts." in key else tensor
            for key, tensor in load_file(saved / "model.safetensors").items()
        },
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    checkpoint, expected = open_checkpoint(tmp_path), model_experts(tmp_path)
    for expert in checkpoint.experts():
        for matrix in expert.matrices:
            match = SUPPORTED["qwen3_vl_moe"].match(matrix.name)
            assert match is not None
            assert match.layout.transposed is None
            side = "out" if matrix.role == "down" else "in"
            want = expected[expert.key.layer, expert.key.expert, side]
            assert checkpoint.read(matrix).T.tobytes() == want.tobytes()


@pytest.mark.parametrize("name", FUSED_TOO)
def test_experts_in_transformers_own_format(name: str, tiny: MakeTiny) -> None:
    folder = tiny(name, original_format=False)
    assert all(m.index is not None for e in open_checkpoint(folder).experts() for m in e.matrices)
    assert_same_experts(name, folder)


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("shared", [False, True])
def test_every_tensor_is_an_experts_or_passes_through(
    name: str, shared: bool, tiny: MakeTiny
) -> None:
    folder = tiny(name)
    checkpoint = open_checkpoint(folder)
    matrices = [m for e in checkpoint.experts(shared=shared) for m in e.matrices]
    experts = {m.name for m in matrices}
    passing = {tensor.name for tensor in checkpoint.passthrough(shared=shared)}
    with safe_open(folder / "model.safetensors", "pt") as stock:
        assert experts | passing == set(stock.keys())
    assert not experts & passing
    assert len({(m.name, m.index) for m in matrices}) == len(matrices)
    # No weight is counted twice or left out of a tensor that is taken apart.
    assert sum(m.n_bytes for m in matrices) == sum(checkpoint.tensors[n].n_bytes for n in experts)
    # What is left over holds no routed expert under a name that nobody knows.
    assert not [n for n in passing if re.search(r"(?<!attention\.)experts\.\d+\.", n)]


@pytest.mark.parametrize("name", sorted(TINY))
def test_shared_experts_are_found_where_the_model_has_them(name: str, tiny: MakeTiny) -> None:
    checkpoint = open_checkpoint(tiny(name))
    found = [e for e in checkpoint.experts(shared=True) if e.key.shared]
    stored = [n for n in checkpoint.tensors if re.search(r"shared_(mlp|experts?)\.|shared_w", n)]
    weights = [n for n in stored if len(checkpoint.tensors[n].shape) >= 2]
    assert {m.name for e in found for m in e.matrices} == set(weights)
    assert checkpoint.shared_bytes == sum(e.n_bytes for e in found)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(name: str, dtype: torch.dtype, tiny: MakeTiny) -> None:
    checkpoint = open_checkpoint(tiny(name, dtype=dtype))
    reference = tiny_model(name, dtype=dtype).state_dict()
    fused = [v for k, v in reference.items() if PARAMETER.search(k) and v.dim() == 3]
    total = sum(v.numel() * v.element_size() for v in fused)
    assert checkpoint.expert_bytes == total
    matrix = checkpoint.experts()[-1].matrices[-1]
    array = checkpoint.read(matrix)
    assert array.dtype == as_array(torch.empty(0, dtype=dtype)).dtype
    np.testing.assert_array_equal(array, fused[-1][-1].numpy())


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4_text", "mixtral"])
def test_shards_give_the_same_as_one_file(name: str, tiny: MakeTiny) -> None:
    one = open_checkpoint(tiny(name))
    many = open_checkpoint(tiny(name, shard_size="20KB"))
    assert len({tensor.file for tensor in many.tensors.values()}) > 2
    assert [e.key for e in one.experts()] == [e.key for e in many.experts()]
    assert {t.name for t in one.passthrough()} == {t.name for t in many.passthrough()}
    for a, b in zip(one.experts(), many.experts(), strict=True):
        for x, y in zip(a.matrices, b.matrices, strict=True):
            assert (x.name, x.role, x.shape, x.index) == (y.name, y.role, y.shape, y.index)
            assert one.read(x).tobytes() == many.read(y).tobytes()


def test_no_model_type_is_in_two_families() -> None:
    assert len(SUPPORTED) == sum(len(family.model_types) for family in FAMILIES)


def test_layouts_say_how_matrices_are_packed() -> None:
    gpt_oss = SUPPORTED["gpt_oss"].match("model.layers.3.mlp.experts.gate_up_proj")
    assert gpt_oss is not None
    assert (gpt_oss.layer, gpt_oss.expert, gpt_oss.role) == (3, None, "gate_up")
    assert gpt_oss.layout.transposed
    assert gpt_oss.layout.interleaved
    moonlight = SUPPORTED["deepseek_v3"].match("model.layers.1.mlp.experts.63.down_proj.weight")
    assert moonlight is not None
    assert (moonlight.layer, moonlight.expert, moonlight.role) == (1, 63, "down")
    assert not moonlight.layout.transposed


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.mlp.experts.0.up_proj.weight",
        "talker.model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight.extra",
        "model.layers.0.mlp.experts.0.up_proj.bias",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "vision.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.99999999999999999999.mlp.experts.0.up_proj.weight",
    ],
)
def test_what_is_no_routed_expert_of_the_language_model(name: str) -> None:
    assert SUPPORTED["qwen3_next"].match(name) is None


def test_the_text_part_of_a_multimodal_config_decides() -> None:
    config = {"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3"}}
    assert find_family(config) is SUPPORTED["deepseek_v3"]


def test_unknown_model_type_is_named_with_those_supported() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'llama' is not a .*deepseek_v3, .*"):
        find_family({"model_type": "llama"})
    with pytest.raises(UnsupportedArchitectureError, match="None is not"):
        find_family({})
    with pytest.raises(UnsupportedArchitectureError):
        find_family({"model_type": ["mixtral"], "text_config": "mixtral"})


@pytest.mark.parametrize("name", runnable(TINY))
def test_top_k_is_what_the_built_model_uses(name: str) -> None:
    model, heard = running_model(name), list[int]()
    for entry in live_experts(model).stacks:
        tap(model, entry.stack, lambda index, _: heard.append(index.shape[-1]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert heard
    assert set(heard) == {top_k_of(model.config.to_dict())}


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_table_is_true_of_the_built_model(name: str, tiny: MakeTiny) -> None:
    folder = tiny(name)
    config = read_json(folder / "config.json")
    family, model = find_family(config), tiny_model(name)
    assert top_k_of(config) == top_k_of(model.config.to_dict()) == TINY_TOP_K.get(name, 2)
    for entry in live_experts(model).stacks:
        assert hasattr(entry.module, "_apply_gate") == family.experts_functions
        assert any(router_of(model, entry.stack.name) is getattr(place, router, None)
                   for router in family.routers
                   for place in (model.get_submodule(entry.stack.name.rpartition(".")[0]),
                                 entry.module))  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [8, 6, 8]}, 8),  # a number a layer
        ({"model_type": "ernie4_5_moe", "moe_k": 6}, 6),
        ({"model_type": "kimi_vl", "text_config": {"model_type": "kimi_k2",
                                                   "num_experts_per_tok": 4}}, 4),
    ],
)  # fmt: skip
def test_top_k_has_other_names(config: dict[str, Any], expected: int) -> None:
    assert top_k_of(config) == expected


@pytest.mark.parametrize("value", [0, None, True, "2", 2.0, [], [2, 0], {"layer": 2}])
def test_a_top_k_that_is_none_is_not_guessed(value: Any) -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'gemma4'.* top_k_experts, found {'top"
    ):
        top_k_of({"model_type": "gemma4", "top_k_experts": value})


def test_a_config_without_top_k_is_not_guessed() -> None:
    config = {"model_type": "jetmoe", "moe_topk": 2}
    message = r"'jetmoe'.* num_experts_per_tok or moe_top_k, found none of them"
    with pytest.raises(UnsupportedArchitectureError, match=message):
        top_k_of(config)
    with pytest.raises(UnsupportedArchitectureError, match="'llama' is not"):
        top_k_of({"model_type": "llama", "num_experts_per_tok": 2})
