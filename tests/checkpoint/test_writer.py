"""Files written here open with the stock library, and appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moebound.checkpoint import (
    INDEX_FILE,
    ShardWriter,
    TensorSpec,
    read_chunks,
    read_header,
    read_tensors,
    write_file,
    write_index,
)
from moebound.errors import StoreError

SPECS = [
    TensorSpec("blob", "U8", (5,)),
    TensorSpec("weights", "BF16", (2, 3)),
    TensorSpec("scale", "F32", ()),
]
DATA = {"blob": b"hello", "weights": bytes(range(12)), "scale": bytes(4)}


def test_bytes_may_come_in_any_order_and_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, SPECS, metadata={"by": "a test"}) as shard:
        shard.write("weights", memoryview(DATA["weights"])[:7])
        shard.write("scale", bytearray(4))
        shard.write("blob", DATA["blob"])
        shard.write("weights", DATA["weights"][7:])
        assert not path.exists()
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert path.stat().st_size == shard.n_bytes
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt", "by": "a test"}
    assert {name: b"".join(read_chunks(t)) for name, t in tensors.items()} == DATA
    with safe_open(path, "pt") as stock:
        assert stock.metadata() == metadata
        assert stock.get_tensor("blob").numpy().tobytes() == b"hello"
        assert stock.get_tensor("weights").shape == (2, 3)
        assert stock.get_tensor("scale").item() == 0.0


def test_data_is_aligned_wider_dtypes_first(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "f", SPECS) as shard:
        for name, data in DATA.items():
            shard.write(name, data)
    tensors = list(read_header(tmp_path / "f")[0].values())
    assert [tensor.name for tensor in tensors] == ["scale", "weights", "blob"]
    assert tensors[0].offset % 8 == 0


def test_threads_write_different_tensors(tmp_path: Path) -> None:
    data = {f"t{n}": bytes([n]) * 1000 for n in range(40)}
    shard = ShardWriter(tmp_path / "f", [TensorSpec(name, "U8", (1000,)) for name in data])

    def write(name: str) -> None:
        shard.write(name, data[name][:10])
        shard.write(name, data[name][10:])

    with shard, ThreadPoolExecutor(8) as pool:
        list(pool.map(write, data))
    tensors, _ = read_header(tmp_path / "f")
    assert {n: b"".join(read_chunks(t)) for n, t in tensors.items()} == data


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "f.safetensors", []):
        pass
    with safe_open(tmp_path / "f.safetensors", "pt") as stock:
        assert list(stock.keys()) == []


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
specs = st.lists(
    st.builds(
        TensorSpec,
        names,
        st.sampled_from(["U8", "BF16", "F16", "F32", "I64", "BOOL"]),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


@settings(max_examples=50)
@given(specs=specs, seed=st.randoms(use_true_random=False))
def test_round_trip(specs: list[TensorSpec], seed: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("round") / "f.safetensors"
    data = {spec.name: seed.randbytes(spec.n_bytes) for spec in specs}
    with ShardWriter(path, specs) as shard:
        for name in sorted(data):
            shard.write(name, data[name])
    tensors, _ = read_header(path)
    assert {n: b"".join(read_chunks(t, chunk_bytes=3)) for n, t in tensors.items()} == data
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in specs
    }
    with safe_open(path, "pt") as stock:
        assert set(stock.keys()) == set(data)
        for spec in specs:
            assert tuple(stock.get_tensor(spec.name).shape) == spec.shape


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("blob", b"123456", "takes 5 bytes, found 6"),
        ("other", b"", "was not announced"),
    ],
)
def test_wrong_bytes(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=message),
        ShardWriter(tmp_path / "f", SPECS) as shard,
    ):
        shard.write(name, data)
    assert os.listdir(tmp_path) == []


def test_missing_bytes(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "f", SPECS)
    for name in ("blob", "scale"):
        shard.write(name, DATA[name])
    shard.write("weights", b"1")
    with pytest.raises(StoreError, match=r"'weights' takes 12 bytes, 11 were never written"):
        shard.finish()
    assert os.listdir(tmp_path) == []


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")

    def interrupted() -> None:
        with ShardWriter(tmp_path / "f", SPECS) as shard:
            shard.write("blob", b"hello")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "f.partial").write_bytes(b"x" * 10_000)
    with ShardWriter(tmp_path / "f", SPECS) as shard:
        for name, data in DATA.items():
            shard.write(name, data)
    assert os.listdir(tmp_path) == ["f"]
    assert set(read_header(tmp_path / "f")[0]) == set(DATA)


def test_finished_writer_takes_no_more(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "f", []) as shard:
        pass
    with pytest.raises(StoreError, match="already finished"):
        shard.write("a", b"")
    with pytest.raises(StoreError, match="already finished"):
        shard.finish()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shard = ShardWriter(tmp_path / "f", SPECS)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"f: cannot be written: No space left"), shard:
        shard.write("blob", b"hello")
    assert os.listdir(tmp_path) == []
    with pytest.raises(StoreError, match="No space left"):
        ShardWriter(tmp_path / "f", SPECS)
    assert os.listdir(tmp_path) == []


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        ShardWriter(tmp_path / "no" / "f", SPECS)
    with pytest.raises(StoreError, match="cannot be written"):
        write_file(tmp_path / "no" / "f", b"")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("__metadata__", "U8", (1,)), "taken by the format"),
        (("\ud800", "U8", (1,)), "not valid Unicode"),
        (("a", "F31", (1,)), "dtype 'F31'"),
        (("a", "F4", (3,)), "whole byte"),
        (("a", "U8", (-1,)), "negative"),
    ],
)
def test_bad_specs(spec: tuple[str, str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        TensorSpec(*spec)


def test_tensor_named_twice(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="written twice"):
        ShardWriter(tmp_path / "f", [SPECS[0], SPECS[0]])
    assert os.listdir(tmp_path) == []


def test_index_and_shards_make_a_checkpoint(tmp_path: Path) -> None:
    for number, name in enumerate(DATA):
        spec = next(spec for spec in SPECS if spec.name == name)
        with ShardWriter(tmp_path / f"{number}.safetensors", [spec]) as shard:
            shard.write(name, DATA[name])
    write_index(tmp_path, {name: f"{n}.safetensors" for n, name in enumerate(DATA)}, 21)
    tensors = read_tensors(tmp_path)
    assert {name: b"".join(read_chunks(t)) for name, t in tensors.items()} == DATA
    assert json.loads((tmp_path / INDEX_FILE).read_text())["metadata"] == {"total_size": 21}
    with pytest.raises(StoreError, match="plain file name"):
        write_index(tmp_path, {"a": "../f"}, 1)
