"""Live experts: every family's views are the checkpoint's matrices, and writing them is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, DbrxConfig, DbrxForCausalLM, LlamaConfig, LlamaForCausalLM

from moebound.checkpoint import open_checkpoint
from moebound.checkpoint.families import Layout, Role
from moebound.codec.arrays import to_numpy
from moebound.errors import UnsupportedArchitectureError
from moebound.model import live_experts
from moebound.types import Array, ExpertKey
from tiny_models import TINY, MakeTiny, model_class, tiny_model

# Text experts and vision experts, of two sizes, in one layer.
TWO_STACKS = "ernie4_5_vl_moe"


def load(folder: Path, **options: Any) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype="auto", **options)


def as_stored(
    live: dict[Role, torch.Tensor], roles: list[Role], layout: Layout
) -> dict[str, Array]:
    """Live matrices put together again as a checkpoint of this layout stores them."""
    parts = dict[str, torch.Tensor](live.items())
    if "gate_up" in roles:
        gate, up = parts.pop("gate"), parts.pop("up")
        both = torch.stack([gate, up], 1).flatten(0, 1) if layout.interleaved else None
        parts["gate_up"] = torch.cat([gate, up]) if both is None else both
    if layout.transposed:
        parts = {role: matrix.mT for role, matrix in parts.items()}
    return {role: to_numpy(matrix) for role, matrix in parts.items()}


@pytest.mark.parametrize("name", sorted(TINY))
def test_live_matrices_are_those_of_the_checkpoint(name: str, tiny: MakeTiny) -> None:
    folder = tiny(name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.family is not None
    experts = live_experts(load(folder))
    stored = {expert.key: expert for expert in checkpoint.experts()}
    assert list(experts) == list(stored)
    for key, expert in stored.items():
        match = checkpoint.family.match(expert.matrices[0].name)
        assert match is not None
        roles = [matrix.role for matrix in expert.matrices]
        found = as_stored(experts[key].matrices, roles, match.layout)
        assert list(experts[key].matrices) == [r for r in ("gate", "up", "down") if r in found or
                                               "gate_up" in found]  # fmt: skip
        for matrix in expert.matrices:
            want = checkpoint.read(matrix)
            got = found[matrix.role]
            assert got.shape == want.shape
            np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
        assert experts[key].n_weights == expert.size


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "jetmoe", "llama4_text", "nemotron_h",
                                  "qwen3_vl_moe", TWO_STACKS])  # fmt: skip
def test_a_written_view_is_what_the_model_saves(name: str, tiny: MakeTiny, tmp_path: Path) -> None:
    model = load(tiny(name))
    experts = live_experts(model)
    before = open_checkpoint(tiny(name))
    key = list(experts)[-2]
    for number, view in enumerate(experts[key].matrices.values(), start=1):
        view.fill_(float(number))
    model.save_pretrained(tmp_path)
    after = open_checkpoint(tmp_path)
    for old, new in zip(before.experts(), after.experts(), strict=True):
        for was, matrix in zip(old.matrices, new.matrices, strict=True):
            weights = after.read(matrix).astype(np.float32)
            if new.key != key:
                np.testing.assert_array_equal(weights, before.read(was).astype(np.float32))
            elif matrix.role == "gate_up":
                assert sorted(np.unique(weights)) == [1.0, 2.0]
            else:
                number = ["gate", "up", "down"].index(matrix.role) + 1
                gateless = "gate" not in experts[key].matrices
                assert (weights == number - gateless).all()


def test_dbrx_views_compute_what_the_model_computes() -> None:
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2,
                    "hidden_size": 32, "ffn_act_fn": {"name": "silu"}},
    )  # fmt: skip
    torch.manual_seed(0)
    model = DbrxForCausalLM(config).train(False)
    experts = live_experts(model)
    assert experts.layers == (0, 1)
    key = ExpertKey(1, 2)
    live = experts[key].matrices
    assert [tuple(m.shape) for m in live.values()] == [(24, 32), (24, 32), (32, 24)]
    for matrix in live.values():
        matrix.copy_(0.1 * torch.randn(matrix.shape))
    x = torch.randn(5, 32)
    only = torch.full((5, 1), key.expert)
    got = experts.modules[1](x, only, torch.ones(5, 1)).reshape(5, 32)
    hidden = nn.functional.silu(x @ live["gate"].mT) * (x @ live["up"].mT)
    torch.testing.assert_close(got, hidden @ live["down"].mT)


def test_views_follow_the_model_to_another_dtype() -> None:
    model: nn.Module = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    expert = live_experts(model)[ExpertKey(1, 3)]
    model.to(torch.float32)
    expert.matrices["up"].fill_(3.0)
    inner = expert.stack.module.get_parameter("gate_up_proj")
    assert inner.dtype == torch.float32
    assert (inner[3, 24:] == 3).all()
    assert not (inner[3, :24] == 3).any()
    assert not (inner[2] == 3).any()


def test_layers_and_modules() -> None:
    model = tiny_model("deepseek_v3")
    experts = live_experts(model)
    assert experts.layers == (1, 2)  # layer 0 is dense
    assert experts.modules[2] is model.get_submodule("model.layers.2.mlp.experts")
    assert experts.in_layer(1) == tuple(ExpertKey(1, e) for e in range(4))
    assert experts.in_layer(0) == ()
    assert len(experts) == 8
    with pytest.raises(KeyError):
        experts[ExpertKey(1, 4)]


def test_text_and_vision_experts_of_one_layer_are_numbered_on() -> None:
    experts = live_experts(tiny_model(TWO_STACKS))
    sizes = [experts[key].matrices["gate"].shape[0] for key in experts.in_layer(1)]
    assert sizes == [16] * 4 + [8] * 4
    assert "text_moe" in next(s.stack.name for s in experts.stacks if s.first == 0)
    assert experts.modules[1] is experts.stacks[0].module


def test_wrapped_models_are_found_too() -> None:
    model = tiny_model("mixtral")
    wrapped = nn.DataParallel(model)  # every name begins with "module."
    experts = live_experts(wrapped)
    assert experts.layers == (0, 1)
    experts[ExpertKey(0, 1)].matrices["down"].fill_(7.0)
    assert (live_experts(model)[ExpertKey(0, 1)].matrices["down"] == 7).all()


def test_a_dense_model_has_none() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=96,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with pytest.raises(UnsupportedArchitectureError, match=r"LlamaForCausalLM: no module .* dense"):
        live_experts(LlamaForCausalLM(config))


def test_weights_on_meta_are_refused_when_asked_for() -> None:
    model: nn.Module = tiny_model("mixtral")
    experts = live_experts(model.to("meta"))
    with pytest.raises(UnsupportedArchitectureError, match=r"experts\.gate_up_proj: .*offload"):
        _ = experts[ExpertKey(0, 0)].matrices


def test_quantized_weights_are_refused() -> None:
    model = tiny_model("mixtral")
    experts = live_experts(model)
    module = experts.modules[0]
    quantized = module.get_parameter("down_proj").to(torch.int8)
    module.down_proj = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(UnsupportedArchitectureError, match=r"down_proj: dtype torch\.int8"):
        _ = experts[ExpertKey(0, 0)].matrices


def test_shapes_that_fit_no_packing_are_refused() -> None:
    model = tiny_model("mixtral")
    module = live_experts(model).modules[1]
    module.down_proj = nn.Parameter(torch.zeros(4, 32, 47))
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.1\.mlp\.experts: 4 experts"):
        live_experts(model)


def test_experts_outside_of_a_decoder_are_refused() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = live_experts(tiny_model("mixtral")).modules[0]

    with pytest.raises(UnsupportedArchitectureError, match="'vision', which names no decoder"):
        live_experts(Tower())
