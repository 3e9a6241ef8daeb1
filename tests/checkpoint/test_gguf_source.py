"""GGUF files as sources: bit for bit what `gguf` dequantizes, and what is said of bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gguf_models
import moebound
from moebound.checkpoint import open_checkpoint, read_tensor
from moebound.codec.arrays import to_torch
from moebound.errors import (
    BackendUnavailable,
    CheckpointError,
    CorruptionError,
    FormatError,
    UnsupportedArchitectureError,
)
from moebound.evaluate.receipt import bytes_of
from moebound.store import compress
from moebound.types import ErrorBound
from quantized_models import plain_model

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model("qwen3_moe", tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "BF16", "F16", "F32"])
def test_tensors_are_what_gguf_dequantizes(plain: Path, tmp_path: Path, kind: str) -> None:
    _same(gguf_models.write(plain, tmp_path / "m.gguf", kind), tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256(kind: str, tmp_path: Path) -> None:
    """`gguf` does not quantize to these, so bytes are drawn."""
    folder = plain_model("qwen3_moe", tmp_path / "plain", hidden=256, inner=256)
    _same(gguf_models.write(folder, tmp_path / "m.gguf", kind), tmp_path / "m.gguf")
    assert f"{kind} of" in str(open_checkpoint(tmp_path / "m.gguf").stored_as)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_other_architectures(family: str, tmp_path: Path) -> None:
    folder = plain_model(family, tmp_path / "plain")
    _same(gguf_models.write(folder, tmp_path / "m.gguf", "Q8_0"), tmp_path / "m.gguf")


def _same(truth: dict[str, torch.Tensor], file: Path) -> None:
    checkpoint = open_checkpoint(file)
    assert set(checkpoint.tensors) == set(truth)
    for name, tensor in checkpoint.tensors.items():
        found = to_torch(read_tensor(tensor))
        assert torch.equal(found.view(torch.int16), truth[name].view(torch.int16)), name


def test_model_has_the_logits_of_its_weights(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from moebound.model.pretrained import load_model

    truth = gguf_models.write(plain, tmp_path / "m.gguf", "Q8_0")
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    model_class = type(wanted)
    wanted.config.norm_topk_prob = True  # as llama.cpp always does for this architecture
    wanted = model_class.from_pretrained(
        None, config=wanted.config, state_dict=truth, dtype=torch.bfloat16
    )
    found = load_model(str(tmp_path / "m.gguf"), dtype=torch.bfloat16)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_tokenizer_is_converted(plain: Path, tmp_path: Path) -> None:
    from moebound.model.pretrained import load_tokenizer

    tokens = ["<end>", "a", "b", "c", "ab", "abc", *(f"t{n}" for n in range(90))]
    gguf_models.write(plain, tmp_path / "m.gguf", "Q8_0", tokens)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    ids = tokenizer("abcab")["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(one) for one in ids] == ["abc", "ab"]
    names = {file.name for file in open_checkpoint(tmp_path / "m.gguf").files()}
    assert "tokenizer.json" in names


def test_store_of_a_gguf_file_is_verified(plain: Path, tmp_path: Path) -> None:
    from moebound.cli.main import main

    gguf_models.write(plain, tmp_path / "m.gguf", "Q8_0")
    file, store = str(tmp_path / "m.gguf"), str(tmp_path / "store")
    assert main(["compress", file, store, "--rate", "0.1"]) == 0
    assert main(["verify", store, "--against", file]) == 0
    card = (tmp_path / "store" / "README.md").read_text()
    for said in ("GGUF, m.gguf", "Q8_0 of", "SHA-256"):
        assert said in card


def test_its_store_runs_offloaded(plain: Path, tmp_path: Path) -> None:
    gguf_models.write(plain, tmp_path / "m.gguf", "Q8_0")
    compress(tmp_path / "m.gguf", tmp_path / "store", bound=ErrorBound(0.3, "rate"))
    ids = torch.arange(3, 23).view(2, 10)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "store", dtype=torch.float32)
    with moebound.load(tmp_path / "store", dtype="float32") as offloaded, torch.no_grad():
        assert (offloaded.model(ids).logits - model(ids).logits).abs().max() < 1e-5


def test_all_its_bytes_are_counted(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "m.gguf"
    file.parent.mkdir()
    gguf_models.write(plain, file, "Q8_0")
    assert bytes_of(str(file)) == bytes_of(str(file.parent)) == file.stat().st_size


def test_damaged_files(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    gguf_models.write(plain, file, "Q8_0")
    whole = file.read_bytes()
    for size in (20, 400, len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:size])
        with pytest.raises(CorruptionError, match="cut short"):
            open_checkpoint(file)
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(FormatError, match="not a GGUF file"):
        open_checkpoint(file)
    file.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"))
    with pytest.raises(UnsupportedArchitectureError, match="attn_z"):
        open_checkpoint(file)
    file.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.9.attn_q.weight"))
    with pytest.raises(CheckpointError, match="q_proj"):
        open_checkpoint(file)
    at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    file.write_bytes(whole[:at] + (99).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(CorruptionError, match="types that the installed gguf does not know"):
        open_checkpoint(file)
    file.write_bytes(whole.replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(UnsupportedArchitectureError, match=r"qwen9moe.*supported: qwen2moe"):
        open_checkpoint(file)


def test_a_folder_with_one_and_a_part_of_a_set(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf_models.write(plain, folder / "m.gguf", "Q8_0")
    assert open_checkpoint(folder).experts()
    (folder / "n.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF models"):
        open_checkpoint(folder)
    (folder / "n.gguf").unlink()
    (folder / "m.gguf").rename(folder / "m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf .* is missing"):
        open_checkpoint(folder)


def test_without_gguf(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    gguf_models.write(plain, tmp_path / "m.gguf", "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendUnavailable, match=r"needs gguf: pip install '.\[gguf\]'"):
        open_checkpoint(tmp_path / "m.gguf")
