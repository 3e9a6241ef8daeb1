"""Quantized checkpoints: read as the weights that their own libraries dequantize them to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moebound
from moebound.checkpoint import open_checkpoint, read_chunks, read_into, read_tensor
from moebound.codec.arrays import to_torch
from moebound.errors import CheckpointError
from moebound.model.pretrained import load_model
from moebound.offload.entries import open_entries
from moebound.store import compress, decompress, verify
from moebound.types import ErrorBound
from quantized_models import KINDS, Made, plain_model, quantized


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """By kind; made when first asked for. Not to be changed."""

    class Kinds(dict[str, Made]):
        def __missing__(self, kind: str) -> Made:
            folder = tmp_path_factory.mktemp("quantized")
            family = "gpt_oss" if kind == "mxfp4" else "qwen3_moe"
            if not (tmp_path_factory.getbasetemp() / family).exists():
                plain_model(family, tmp_path_factory.getbasetemp() / family)
            plain = tmp_path_factory.getbasetemp() / family
            self[kind] = quantized(plain, folder / kind, kind)
            return self[kind]

    return Kinds()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_library(kind: str, made: dict[str, Made]) -> None:
    checkpoint = open_checkpoint(made[kind].folder)
    assert checkpoint.stored_as is not None
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.tensors.keys() == made[kind].truth.keys()
    computed = [t for t in checkpoint.tensors.values() if t.stored is not None]
    assert len(computed) >= 2 * 2  # of two layers' experts, at least
    for name, tensor in checkpoint.tensors.items():
        found, exact = to_torch(read_tensor(tensor)), made[kind].truth[name]
        assert found.dtype == exact.dtype, name
        assert torch.equal(found, exact), name
    assert checkpoint.stored_bytes < checkpoint.total_bytes


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gptq", "ct-int4"])
def test_any_stretch_of_bytes_is_the_same(kind: str, made: dict[str, Made]) -> None:
    checkpoint = open_checkpoint(made[kind].folder)
    tensor = next(t for t in checkpoint.tensors.values() if t.stored is not None)
    whole = np.ascontiguousarray(read_tensor(tensor)).reshape(-1).view(np.uint8).tobytes()
    assert b"".join(map(bytes, read_chunks(tensor, chunk_bytes=77))) == whole
    for start, stop in ((0, 1), (3, 131), (len(whole) - 5, len(whole)), (64, 64)):
        piece = bytearray(stop - start)
        read_into(tensor, memoryview(piece), start=start)
        assert bytes(piece) == whole[start:stop]


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "ct-nvfp4", "gptq"])
def test_compressed_verified_and_decompressed(
    kind: str, made: dict[str, Made], tmp_path: Path
) -> None:
    folder = made[kind].folder
    summary = compress(folder, tmp_path / "store", bound=ErrorBound(0.3, "rate", "expert"))
    assert "stored as" in summary.remarks[0]
    assert verify(tmp_path / "store", against=folder).ok
    assert "quantization_config" in json.loads((tmp_path / "store" / "config.json").read_text())
    decompress(tmp_path / "store", tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert out.stored_as is None
    experts = {m.name for expert in out.experts() for m in expert.matrices}
    for name, tensor in out.tensors.items():
        found, exact = to_torch(read_tensor(tensor)), made[kind].truth[name]
        if name in experts:
            assert (found.double() - exact.double()).abs().max() > 0
        else:
            assert torch.equal(found, exact), name
    card = (tmp_path / "store" / "README.md").read_text()
    assert str(open_checkpoint(folder).stored_as) in card


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "ct-int4", "awq"])
def test_loaded_with_the_weights_that_are_compressed(
    kind: str, made: dict[str, Made], tmp_path: Path
) -> None:
    folder = made[kind].folder
    compress(folder, tmp_path / "store", bound=None, method="bounded:lossless")
    decompress(tmp_path / "store", tmp_path / "plain")
    shutil.copy(folder / "generation_config.json", tmp_path / "plain")
    models = [_load(path) for path in (folder, tmp_path / "plain", tmp_path / "store")]
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert models[0].generation_config.max_new_tokens == 7


def _load(folder: Path) -> Any:
    from moebound.integrations.transformers import register
    from moebound.model.pretrained import load_model

    register()
    return load_model(folder, dtype=torch.float32)


def test_transformers_reads_fp8_to_the_same_weights(made: dict[str, Made]) -> None:
    pytest.importorskip("accelerate", reason="transformers dequantizes FP8 with accelerate")
    from transformers import AutoModelForCausalLM

    folder = made["fp8"].folder
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    ours = _load(folder).state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name].to(torch.bfloat16)), name


# --- what is wrong


def _damaged(made: Made, folder: Path, change: object) -> Path:
    shutil.copytree(made.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


PART = {
    "fp8": "_scale_inv",
    "mxfp4": "_scales",
    "gptq": ".qzeros",
    "awq": ".scales",
    "ct-int4": "_shape",
    "ct-nvfp4": "weight_scale",
}


@pytest.mark.parametrize("kind", PART)
def test_a_part_that_is_missing_is_named(kind: str, made: dict[str, Made], tmp_path: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if name.endswith(PART[kind]))]

    with pytest.raises(CheckpointError, match=rf"has no '.*{PART[kind]}'"):
        open_checkpoint(_damaged(made[kind], tmp_path / "copy", remove))


@pytest.mark.parametrize("kind", PART)
def test_a_part_of_another_shape_is_named(kind: str, made: dict[str, Made], tmp_path: Path) -> None:
    def lengthen(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(PART[kind]))
        tensors[name] = torch.cat([tensors[name], tensors[name], tensors[name]])

    with pytest.raises(CheckpointError, match=rf"{PART[kind]}' has shape"):
        open_checkpoint(_damaged(made[kind], tmp_path / "copy", lengthen))


def test_a_group_that_is_not_there_is_named(made: dict[str, Made], tmp_path: Path) -> None:
    def reorder(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("g_idx"):
                tensors[name] = tensors[name] + 1

    checkpoint = open_checkpoint(_damaged(made["gptq"], tmp_path / "copy", reorder))
    with pytest.raises(CheckpointError, match=r"g_idx' has groups 1 to 4, expected 0 to 3"):
        checkpoint.read(checkpoint.experts()[0].matrices[0])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("awq", {"version": "gemv"}, "packed for 'gemv'"),
        ("awq", {"bits": 3}, "AWQ of 3 bits"),
        ("gptq", {"group_size": "all"}, "group_size: expected a number"),
        ("fp8", {"quant_method": "bitsandbytes"}, "expected one of fp8, mxfp4"),
        ("ct-int4", {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
    ],
)
def test_a_config_that_says_something_else(
    kind: str, change: dict[str, object], words: str, made: dict[str, Made], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made[kind].folder, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gptq"])
def test_offloaded_as_it_is(kind: str, made: dict[str, Made]) -> None:
    """Experts are dequantized each time they are read."""
    folder = made[kind].folder
    ids = torch.arange(3, 23).view(2, 10)
    model = load_model(folder, dtype=torch.float32)
    with moebound.load(folder, dtype="float32") as offloaded, torch.no_grad():
        assert (offloaded.model(ids).logits - model(ids).logits).abs().max() < 1e-5
        assert not open_entries(folder).compressed
