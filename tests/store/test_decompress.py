"""Back to an ordinary checkpoint: same names, dtypes, shapes and shards; nothing of moebound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebound.checkpoint import open_checkpoint, read_tensor
from moebound.errors import CorruptionError, StoreError
from moebound.store import Progress, decompress, open_store

from .conftest import MakeSource, MakeStore, contents, run
from .test_verify import flip

WITHOUT_MOEBOUND = """
import sys
sys.modules["moebound"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert not hasattr(model.config, "quantization_config")
model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)
"""


@pytest.mark.parametrize("codec", ["bound", "raw"])
@pytest.mark.parametrize(
    ("name", "shard_size"), [("deepseek_v3", "30KB"), ("gpt_oss", "1GB"), ("granitemoe", "1GB")]
)
def test_same_tensors_same_shards(
    name: str, shard_size: str, codec: str, source: MakeSource, tmp_path: Path
) -> None:
    src = source(name, shard_size=shard_size)
    run(src, tmp_path / "dst", codec=codec)
    seen: list[Progress] = []
    summary = decompress(tmp_path / "dst", tmp_path / "out", jobs=2, progress=seen.append)
    before, after = open_checkpoint(src), open_checkpoint(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    for key, tensor in before.tensors.items():
        again = after.tensors[key]
        found = again.dtype, again.shape, again.file.name
        assert found == (tensor.dtype, tensor.shape, tensor.file.name)
        if codec == "raw":
            assert read_tensor(again).tobytes() == read_tensor(tensor).tobytes()
    names = {"README.md", "config.json", "generation_config.json", "tokenizer.json"}
    assert names <= contents(tmp_path / "out").keys() == contents(src).keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((src / "config.json").read_text())
    assert summary.n_bytes == before.total_bytes
    assert summary.n_experts == 8
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert seen[-1].done_experts == seen[-1].total_experts == 8


def test_experts_are_the_decoded_ones(shared_store: MakeStore, tmp_path: Path) -> None:
    _, dst = shared_store("gpt_oss")
    decompress(dst, tmp_path / "out")
    store, after = open_store(dst), open_checkpoint(tmp_path / "out")
    for expert in after.experts():
        weights = store.decode_expert(expert.key)
        for matrix in expert.matrices:
            assert after.read(matrix).tobytes() == weights[matrix.role].tobytes()


def test_loads_where_moebound_is_not_installed(shared_store: MakeStore, tmp_path: Path) -> None:
    decompress(shared_store("mixtral")[1], tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MOEBOUND, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MISSING" not in done.stderr
    assert "UNEXPECTED" not in done.stderr


def test_a_damaged_tensor_is_named_and_nothing_is_left(
    own_store: MakeStore, tmp_path: Path
) -> None:
    _, dst = own_store()
    tensor = open_store(dst).experts()[5].matrices[2].tensor
    flip(tensor.file, tensor.offset + 40)
    with pytest.raises(CorruptionError, match=tensor.name):
        decompress(dst, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_places(shared_store: MakeStore, source: MakeSource, tmp_path: Path) -> None:
    _, dst = shared_store()
    out = tmp_path / "out"
    decompress(dst, out)
    first = contents(out)
    with pytest.raises(StoreError, match="exists and is not empty"):
        decompress(dst, out)
    run(source(), tmp_path / "raw", codec="raw")
    decompress(tmp_path / "raw", out, overwrite=True)
    assert contents(out) != first
    decompress(dst, out, overwrite=True)
    assert contents(out) == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(StoreError, match="only a checkpoint is overwritten"):
        decompress(dst, tmp_path / "mine", overwrite=True)
    with pytest.raises(StoreError, match="itself"):
        decompress(dst, dst, overwrite=True)
    with pytest.raises(StoreError, match="inside"):
        decompress(dst, dst / "out")


def test_dtypes(source: MakeSource, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        src = source("mixtral", dtype=dtype)
        run(src, tmp_path / str(dtype))
        decompress(tmp_path / str(dtype), tmp_path / f"{dtype}-out")
        before, after = open_checkpoint(src), open_checkpoint(tmp_path / f"{dtype}-out")
        for key, tensor in before.tensors.items():
            assert after.tensors[key].dtype == tensor.dtype
