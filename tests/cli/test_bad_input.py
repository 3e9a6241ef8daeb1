"""Bad input: exit code 2 (or 1 for a negative verdict), and a message that names the thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moebound.wordmath.builtin import resolve

from .conftest import SRC, Run


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999", "x"])
@pytest.mark.parametrize("option", ["--rate", "--abs", "--range", "--rmse"])
def test_a_bound_that_is_none(run: Run, tmp_path: Path, option: str, value: str) -> None:
    ran = run("compress", SRC, tmp_path / "dst", option, value)
    assert ran.code == 2
    assert option in ran.stderr
    assert value in ran.stderr
    assert not (tmp_path / "dst").exists()


def test_no_bound(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "dst")
    assert ran.code == 2
    for option in ("--rate", "--abs", "--range", "--rmse"):
        assert option in ran.stderr


def test_two_bounds(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "dst", "--rate", "0.1", "--abs", "0.1")
    assert ran.code == 2
    assert "--rate and --abs" in ran.stderr


def test_scope_without_rate(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "dst", "--abs", "0.1", "--scope", "matrix")
    assert ran.code == 2
    assert "--scope" in ran.stderr


def test_resume_and_overwrite(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "dst", "--abs", "0.1", "--resume", "--overwrite")
    assert ran.code == 2
    assert "--overwrite" in ran.stderr


@pytest.mark.parametrize("layers", ["x", "3-1", "1,,2", "-1", "0-999999999999"])
def test_bad_index_list(run: Run, tmp_path: Path, layers: str) -> None:
    ran = run("compress", SRC, tmp_path / "dst", "--rate", "0.1", "--layers", layers)
    assert ran.code == 2
    assert "--layers" in ran.stderr


def test_layer_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ran = run("compress", SRC, tmp_path / "dst", "--rate", "0.1", "--layers", "77")
    assert ran.code == 2
    assert "77" in ran.stderr


@pytest.mark.parametrize("codec", ["nosuch", "sz3:nosuch"])
def test_unknown_codec(run: Run, tmp_path: Path, codec: str) -> None:
    ran = run("compress", SRC, tmp_path / "dst", "--rate", "0.1", "--codec", codec)
    assert ran.code == 2
    assert "nosuch" in ran.stderr


def test_dst_exists(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine.txt").write_text("keep me")
    ran = run("compress", SRC, tmp_path / "dst", "--rate", "0.1")
    assert ran.code == 2
    assert str(tmp_path / "dst") in ran.stderr
    assert (tmp_path / "dst" / "mine.txt").read_text() == "keep me"


def test_dst_under_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = run("compress", SRC, tmp_path / "file" / "dst", "--rate", "0.1")
    assert ran.code == 2
    assert "file" in ran.stderr


@pytest.mark.parametrize("command", [["inspect"], ["compress", "--rate", "1"]])
def test_missing_source(run: Run, tmp_path: Path, command: list[str]) -> None:
    missing = tmp_path / "nowhere" / "at" / "all"
    dst = [str(tmp_path / "dst")] if command[0] == "compress" else []
    ran = run(command[0], missing, *dst, *command[1:])
    assert ran.code == 2
    assert str(missing) in ran.stderr


def test_unknown_builtin(run: Run) -> None:
    ran = run("inspect", "builtin:nosuch")
    assert ran.code == 2
    assert "builtin:wordmath" in ran.stderr


def test_unknown_architecture(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ran = run("inspect", tmp_path)
    assert ran.code == 2
    assert "'gpt2'" in ran.stderr
    assert "mixtral" in ran.stderr  # what is supported


def test_file_that_is_no_safetensors(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"PK\x03\x04 surely a zip file " * 10)
    ran = run("inspect", file)
    assert ran.code == 2
    assert str(file) in ran.stderr
    assert "safetensors" in ran.stderr


def test_source_cut_short(run: Run, tmp_path: Path) -> None:
    src = Path(shutil.copytree(resolve(SRC), tmp_path / "src"))
    weights = src / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ran = run("compress", src, tmp_path / "dst", "--rate", "0.1")
    assert ran.code == 1
    assert str(weights) in ran.stderr
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("command", ["verify", "decompress"])
def test_not_a_store(run: Run, tmp_path: Path, command: str) -> None:
    out = [str(tmp_path / "out")] if command == "decompress" else []
    for place in (resolve(SRC), tmp_path / "nowhere"):
        ran = run(command, place, *out)
        assert ran.code == 2
        assert str(place) in ran.stderr


@pytest.mark.parametrize("against", [False, True])
def test_flipped_byte_is_a_negative_verdict(run: Run, own_store: Path, against: bool) -> None:
    shard = sorted(own_store.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 0x40
    shard.write_bytes(data)
    ran = run("verify", own_store, *(["--against", SRC] if against else []))
    assert ran.code == 1
    assert "problem" in ran.stdout
    document = run("verify", own_store, "--json").document
    assert document["ok"] is False
    assert document["problems"]


def test_lost_certificates_are_a_negative_verdict(run: Run, own_store: Path) -> None:
    (own_store / "moebound.certificates.jsonl").unlink()
    assert run("verify", own_store).code == 1


def test_another_original_is_a_negative_verdict(run: Run, own_store: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(resolve(SRC), tmp_path / "src"))
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][3, 4] += 1
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    ran = run("verify", own_store, "--against", src)
    assert ran.code == 1
    assert "experts.5.up_proj" in ran.stdout


def test_decompress_of_a_damaged_store(run: Run, own_store: Path, tmp_path: Path) -> None:
    shard = sorted(own_store.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-100] ^= 0x40
    shard.write_bytes(data)
    ran = run("decompress", own_store, tmp_path / "out")
    assert ran.code == 1
    assert shard.name in ran.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_command_and_option(run: Run) -> None:
    assert run("nosuch").code == 2
    ran = run("inspect", SRC, "--nosuch")
    assert ran.code == 2
    assert "--nosuch" in ran.stderr
