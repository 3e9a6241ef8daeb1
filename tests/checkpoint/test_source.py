"""Opening checkpoints: what is found, and what is refused with which words."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moebound.checkpoint import open_checkpoint
from moebound.errors import CheckpointError, CorruptionError, UnsupportedArchitectureError
from moebound.types import ExpertKey
from tiny_models import MakeTiny


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def copy(tiny: MakeTiny, tmp_path: Path) -> Path:
    """A DeepSeek-V3 checkpoint of 3 layers (1 dense) that a test may damage."""
    return Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "copy"))


def write_model(folder: Path, model_type: str, names: list[str], **config: Any) -> Path:
    """A checkpoint with 2 x 2 tensors of these names."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    save_file({name: torch.ones(2, 2) for name in names}, folder / "model.safetensors")
    return folder


def names(layer: int, expert: int) -> list[str]:
    return [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for projection in ("gate", "up", "down")
    ]


def test_what_a_checkpoint_tells(tiny: MakeTiny) -> None:
    folder = tiny("deepseek_v3")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.path == folder
    assert checkpoint.config["model_type"] == "deepseek_v3"
    assert checkpoint.family is not None
    experts = checkpoint.experts()
    assert [e.key for e in experts] == [ExpertKey(n, e) for n in (1, 2) for e in range(4)]
    assert [m.role for m in experts[0].matrices] == ["gate", "up", "down"]
    assert experts[0].size == 3 * 24 * 32
    assert checkpoint.expert_bytes == 8 * 3 * 24 * 32 * 2
    assert checkpoint.shared_bytes == 2 * 3 * 24 * 32 * 2
    stored = (folder / "model.safetensors").stat().st_size
    assert checkpoint.expert_bytes < checkpoint.total_bytes < stored
    with_shared = checkpoint.experts(shared=True)
    assert [e.key for e in with_shared if e.key.shared] == [
        ExpertKey(1, 0, shared=True),
        ExpertKey(2, 0, shared=True),
    ]
    assert len(checkpoint.passthrough()) - len(checkpoint.passthrough(shared=True)) == 2 * 3


def test_reading_gives_arrays_that_own_their_memory(tiny: MakeTiny) -> None:
    checkpoint = open_checkpoint(tiny("gpt_oss"))
    matrix = checkpoint.experts()[5].matrices[0]
    assert (matrix.role, matrix.index, matrix.dtype) == ("gate_up", 1, "BF16")
    array = checkpoint.read(matrix)
    assert array.flags.owndata
    assert array.flags.writeable
    assert array.shape == matrix.shape
    assert array.nbytes == matrix.n_bytes
    before = array.copy()
    array[:] = 0
    np.testing.assert_array_equal(checkpoint.read(matrix, drop_cache=True), before)


def test_checkpoints_travel_between_processes(tiny: MakeTiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    expert = checkpoint.experts()[3]
    other = pickle.loads(pickle.dumps(checkpoint))
    assert other.experts()[3] == expert
    assert other.read(expert.matrices[0]).tobytes() == checkpoint.read(expert.matrices[0]).tobytes()


def test_other_files_to_copy(copy: Path) -> None:
    for name in ("tokenizer.json", "LICENSE", "pytorch_model.bin", ".gitattributes", "x.partial"):
        (copy / name).write_text("{}")
    (copy / "original").mkdir()
    assert [file.name for file in open_checkpoint(copy).files()] == [
        "LICENSE",
        "generation_config.json",
        "tokenizer.json",
    ]


def test_lone_file_has_tensors_and_no_experts(tiny: MakeTiny) -> None:
    checkpoint = open_checkpoint(tiny("mixtral") / "model.safetensors")
    assert checkpoint.family is None
    assert checkpoint.experts(shared=True) == []
    assert len(checkpoint.passthrough()) == len(checkpoint.tensors)
    assert checkpoint.files() == []


# --- not there


@pytest.mark.parametrize("src", ["/no/such/model", "./model", "../model", "a/b/c", "~/nothing here",
                                 "model.safetensors", "C:\\model"])  # fmt: skip
def test_what_can_only_be_a_path_is_not_looked_up(
    src: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("looked up")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(src)


def test_hub_id_that_is_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no local folder of this name"):
        open_checkpoint("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


def test_hub_arguments_are_passed_on(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        seen.update(options, repo=repo)
        return str(tiny("mixtral"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = open_checkpoint("org/model", revision="v1", token="t", cache_dir=tmp_path)
    assert len(checkpoint.experts()) == 8
    assert (seen["repo"], seen["revision"], seen["token"]) == ("org/model", "v1", "t")
    assert seen["local_files_only"] is False
    assert "*.safetensors" in seen["allow_patterns"]


def test_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a folder, a \.safetensors file or a \.gguf file"):
        open_checkpoint(tmp_path / "model.bin")


def test_folder_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(copy)


def test_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CorruptionError, match=r"config\.json: not valid JSON"):
        open_checkpoint(copy)


def test_truncated_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptionError, match="cut short"):
        open_checkpoint(copy)


# --- not a Mixture-of-Experts checkpoint in plain numbers


def test_dense_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=r"'llama'.*supported:.*deepseek_v3"):
        open_checkpoint(tmp_path)


def test_unknown_model_type(copy: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="'brand_new'"):
        open_checkpoint(edit_config(copy, model_type="brand_new"))


def test_supported_architecture_without_experts(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "granitemoehybrid", ["model.layers.0.shared_mlp.x.weight"])
    with pytest.raises(UnsupportedArchitectureError, match="is dense"):
        open_checkpoint(folder)


@pytest.mark.parametrize("part", ["quantization_config", "compression_config"])
def test_quantized_by_config(copy: Path, part: str) -> None:
    edit_config(copy, **{part: {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match=r"quant_method 'fp8'.*dequantize"):
        open_checkpoint(copy)


def test_quantized_text_part(copy: Path) -> None:
    text = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "int4"}}
    with pytest.raises(CheckpointError, match="'int4'"):
        open_checkpoint(edit_config(copy, text_config=text))


def test_store_is_not_compressed_again(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "moebound"})
    with pytest.raises(CheckpointError, match="already compressed by moebound"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv",
        "model.layers.1.mlp.experts.0.up_proj.qweight",
        "model.layers.1.mlp.experts.gate_up_proj_blocks",
        "model.layers.1.mlp.experts.gate_up_proj_scales",
    ],
)
def test_quantized_tensors_without_a_word_in_the_config(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "deepseek_v3", [*names(0, 0), name])
    with pytest.raises(CheckpointError, match=f"quantized checkpoint .*{name.split('.')[-1]}"):
        open_checkpoint(folder)


def test_expert_of_a_dtype_that_is_no_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "deepseek_v3", [])
    tensors = {name: torch.ones(2, 2, dtype=torch.int8) for name in names(0, 0)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is I8, expected one of BF16, F16, F32"):
        open_checkpoint(folder)


# --- inconsistent


def test_expert_that_lacks_a_projection(tmp_path: Path) -> None:
    present = [name for e in range(4) for name in names(3, e)]
    present.remove("model.layers.3.mlp.experts.3.down_proj.weight")
    folder = write_model(tmp_path, "qwen3_moe", present)
    with pytest.raises(CheckpointError, match="layer 3 expert 3 has no down projection"):
        open_checkpoint(folder)


def test_fused_layer_that_lacks_a_projection(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gpt_oss", [])
    save_file({"model.layers.0.mlp.experts.down_proj": torch.ones(2, 2, 2)},
              folder / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="layer 0 expert 0 has no gate_up projection"):
        open_checkpoint(folder)


def test_expert_that_is_missing(tmp_path: Path) -> None:
    present = [name for e in (0, 2) for name in names(1, e)]
    with pytest.raises(CheckpointError, match="layer 1 lacks expert 1; it has 2, expected 3"):
        open_checkpoint(write_model(tmp_path, "qwen3_moe", present))
    present = [name for e in (0, 1) for name in names(1, e)]
    with pytest.raises(CheckpointError, match="layer 1 lacks expert 2, 3"):
        open_checkpoint(write_model(tmp_path, "qwen3_moe", present, num_experts=4))


def test_more_experts_than_the_config_says(tmp_path: Path) -> None:
    present = [name for e in range(3) for name in names(0, e)]
    with pytest.raises(CheckpointError, match=r"has 3 experts, config\.json says 2"):
        open_checkpoint(write_model(tmp_path, "qwen3_moe", present, num_experts=2))


def test_projection_that_is_there_twice(tmp_path: Path) -> None:
    twice = [*names(0, 0), "layers.0.mlp.experts.0.up_proj.weight"]
    with pytest.raises(CheckpointError, match="two tensors for up"):
        open_checkpoint(write_model(tmp_path, "qwen3_moe", twice))


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (1 << 40, 0)])
def test_expert_tensor_of_a_wrong_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3_moe", [])
    tensors = {name: torch.ones(shape) for name in names(0, 0)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dimensions|is empty"):
        open_checkpoint(folder)


# --- layers that are no layers, and model types that transformers does not have


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", "glm4_moe"])
def test_prediction_heads_pass_through(model_type: str, tmp_path: Path) -> None:
    head = [*names(2, 0), "model.layers.2.mlp.shared_experts.up_proj.weight"]
    present = [*names(1, 0), *head, "mtp.layers.0.mlp.experts.0.up_proj.weight"]
    checkpoint = open_checkpoint(write_model(tmp_path, model_type, present, num_hidden_layers=2))
    assert [e.key for e in checkpoint.experts(shared=True)] == [ExpertKey(1, 0)]
    assert {t.name for t in checkpoint.passthrough(shared=True)} == set(present) - set(names(1, 0))


def test_first_deepseek_moe(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "deepseek", [*names(1, 0), *names(1, 1)], n_routed_experts=2)
    assert len(open_checkpoint(folder).experts()) == 2


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_step3_stacks_gate_and_up_apart(prefix: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "step3p7", [])
    tensors = {
        f"{prefix}layers.4.moe.{projection}_proj.weight": torch.ones(2, 3, 5)
        for projection in ("gate", "up", "down")
    }
    save_file(tensors, folder / "model.safetensors")
    experts = open_checkpoint(folder).experts()
    assert [e.key for e in experts] == [ExpertKey(4, 0), ExpertKey(4, 1)]
    assert [(m.role, m.index) for m in experts[1].matrices] == [("gate", 1), ("up", 1), ("down", 1)]


# --- the most common causes


def test_a_quantization_config_that_was_left_over_is_told_apart(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"no tensor is quantized.*remove quantization_con"):
        open_checkpoint(copy)
    edit_config(copy, quantization_config=["of", "another", "type"])
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        open_checkpoint(copy)
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "q_a_proj" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors")
    edit_config(copy, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=rf"{name}' has no '{name}_scale_inv'"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("prefix", "cause"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("base_model.model.", "PEFT"),
        ("module._orig_mod.", "DataParallel"),
    ],
)
def test_a_wrappers_prefix_is_named(prefix: str, cause: str, tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "m", "qwen3_moe", [prefix + name for e in range(2) for name in names(0, e)],
        num_experts=2,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=rf"left by a wrapper .*{cause}"):
        open_checkpoint(folder)


def test_experts_are_counted_before_they_are_listed(tmp_path: Path) -> None:
    n = 10**10
    name = "model.layers.0.mlp.experts.gate_up_proj"
    header = {name: {"dtype": "BF16", "shape": [n, 1, 1], "data_offsets": [0, 2 * n]}}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with open(tmp_path / "model.safetensors", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + 2 * n)  # a hole, no bytes on disk
    with pytest.raises(CheckpointError, match=f"has {n} slices, expected at most 100000"):
        open_checkpoint(tmp_path)


def test_another_prefix_is_named_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "qwen3_moe", ["own." + name for name in names(0, 0)])
    with pytest.raises(
        UnsupportedArchitectureError, match=r"would be one without 'own\.' in front"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": "3"},
        {"n_routed_experts": [4]},
        {"n_routed_experts": 10**30},
        {"n_routed_experts": -1},
        {"model_type": {"deepseek_v3": 1}},
        {"text_config": [1]},
        {"quantization_config": 1},
    ],
)
def test_wrong_types_in_the_config_are_refused_or_harmless(
    copy: Path, changes: dict[str, Any]
) -> None:
    edit_config(copy, **changes)
    with contextlib.suppress(CheckpointError):
        open_checkpoint(copy).experts()
