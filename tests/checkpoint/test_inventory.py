"""Every file of a folder is the model's, carried, or named as left out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from safetensors.torch import load_file, save_file

from moebound.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from moebound.checkpoint.source import _HUB_IGNORED, _HUB_PATTERNS
from moebound.errors import CheckpointError
from tiny_models import MakeTiny

MTP = {"mtp.fc.weight": torch.ones(4, 2)}


@pytest.fixture
def single(tiny: MakeTiny, tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    return Path(shutil.copytree(tiny("mixtral"), tmp_path / "single"))


@pytest.fixture
def sharded(tiny: MakeTiny, tmp_path: Path) -> Path:
    """A checkpoint of several shards, with an index."""
    return Path(shutil.copytree(tiny("mixtral", shard_size="20KB"), tmp_path / "sharded"))


def index(folder: Path, **shards: list[str]) -> None:
    """An index beside model.safetensors that also names these."""
    weight_map = dict.fromkeys(load_file(folder / SINGLE_FILE), SINGLE_FILE)
    for shard, names in shards.items():
        weight_map |= dict.fromkeys(names, f"{shard}.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_a_sidecar_that_the_index_names_belongs_to_the_model(single: Path) -> None:
    save_file(MTP, single / "mtp.safetensors")
    index(single, mtp=list(MTP))
    checkpoint = open_checkpoint(single)
    assert checkpoint.tensors["mtp.fc.weight"].file.name == "mtp.safetensors"
    assert len(checkpoint.tensors) == len(load_file(single / SINGLE_FILE)) + 1
    assert checkpoint.left_out == {}
    assert single / "mtp.safetensors" not in checkpoint.files()


def test_the_other_half_of_a_pair_is_named(single: Path) -> None:
    names = list(load_file(single / SINGLE_FILE))
    save_file({name: torch.zeros(1) for name in names[:3]}, single / "half.safetensors")
    index(single, half=names[:3])
    (single / "pytorch_model.bin").write_bytes(b"x")
    checkpoint = open_checkpoint(single)
    assert {t.file.name for t in checkpoint.tensors.values()} == {SINGLE_FILE}
    assert set(checkpoint.left_out) == {"half.safetensors", "pytorch_model.bin"}
    assert f"which the model has from {SINGLE_FILE}" in checkpoint.left_out["half.safetensors"]


def test_a_shard_that_repeats_a_part_is_refused(single: Path) -> None:
    name = next(iter(load_file(single / SINGLE_FILE)))
    save_file({name: torch.zeros(1), **MTP}, single / "part.safetensors")
    index(single, part=[name, *MTP])
    with pytest.raises(CheckpointError, match=r"part\.safetensors shares 1 of its 2 tensors"):
        open_checkpoint(single)


def test_a_sidecar_that_is_not_there_is_named(single: Path) -> None:
    index(single, mtp=list(MTP))
    left_out = open_checkpoint(single).left_out
    assert left_out == {
        "mtp.safetensors": f"is missing; {INDEX_FILE} has 1 tensors in it, as 'mtp.fc.weight'"
    }


def test_weights_that_no_index_names_are_carried_unless_they_are_the_model_again(
    sharded: Path,
) -> None:
    tensors = open_checkpoint(sharded).tensors
    save_file(MTP, sharded / "mtp.safetensors")
    save_file({next(iter(tensors)): torch.ones(2)}, sharded / "old.safetensors")
    save_file({"layers.0.wq": torch.ones(2)}, sharded / "consolidated.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)},
              sharded / "adapter_model.safetensors")  # fmt: skip
    (sharded / "cut.safetensors").write_bytes(b"{")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensors == tensors
    weights = [file.name for file in checkpoint.files() if file.suffix == ".safetensors"]
    assert weights == ["adapter_model.safetensors", "mtp.safetensors"]
    left_out = checkpoint.left_out
    assert set(left_out) == {"consolidated.safetensors", "cut.safetensors", "old.safetensors"}
    assert "Mistral" in left_out["consolidated.safetensors"]
    assert "cannot be read as safetensors" in left_out["cut.safetensors"]


def test_everything_else_has_a_reason(single: Path, tmp_path: Path) -> None:
    templates = single / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("T")
    (templates / "notes.txt").write_text("")
    (single / "original").mkdir()
    (single / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(single / "pipe.json")
    (single / "vocab.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (single / "page.json").write_text("<!DOCTYPE html><html>")
    (single / "page.html").write_text("<!DOCTYPE html><html>")
    (single / "empty.txt").write_text("")
    (single / "weights.incomplete").write_text("")
    (single / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    (single / ".gitattributes").write_text("")
    checkpoint = open_checkpoint(single)
    assert [file.relative_to(single).as_posix() for file in checkpoint.files()] == [
        "additional_chat_templates/tool_use.jinja", "empty.txt", "generation_config.json",
        "page.html",
    ]  # fmt: skip
    expected = {
        "additional_chat_templates/notes.txt": "chat template", "caf\\udce9.json": "name",
        "gone.txt": "is a link to", "original": "is a folder", "page.json": "web page",
        "pipe.json": "no ordinary file", "vocab.json": "git lfs pull",
        "weights.incomplete": "unfinished",
    }  # fmt: skip
    assert checkpoint.left_out.keys() == expected.keys()
    for name, words in expected.items():
        assert words in checkpoint.left_out[name]


def test_of_a_hub_repository_chat_templates_are_the_only_folder_fetched() -> None:
    templates = "additional_chat_templates"
    names = [
        "config.json", "model.safetensors", f"{templates}/rag.jinja", "chat_template.jinja",
        "consolidated.safetensors", "original/params.json", "a/b.json", f"{templates}_old/x.jinja",
        f"{templates}/deep/x.jinja", "additional/x.jinja", "onnx/model.json", "pytorch_model.bin",
    ]  # fmt: skip
    found = list(
        filter_repo_objects(names, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
    )
    assert found == names[:4]
