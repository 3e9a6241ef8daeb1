"""safetensors files, sound and hostile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moebound.checkpoint import (
    INDEX_FILE,
    read_chunks,
    read_header,
    read_into,
    read_tensor,
    read_tensors,
)
from moebound.checkpoint.shards import MAX_HEADER_BYTES, MAX_JSON_BYTES, read_json
from moebound.errors import CheckpointError, CorruptionError, FormatError, MoeboundError

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def write_raw(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": GOOD["a"] | changes}


MALFORMED: dict[str, tuple[Any, bytes, type[FormatError], str]] = {
    "not json": (b"{nonsense", b"", CorruptionError, "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", CorruptionError, "not valid JSON"),
    "no object": (b"[]", b"", FormatError, "does not start with"),
    "leading space": (b" {}", b"", FormatError, "does not start with"),
    "empty header": (b"", b"", FormatError, "does not start with"),
    "deeply nested": (b'{"a":' + b"[" * 100_000, b"", CorruptionError, "not valid JSON"),
    "huge number": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        b"x",
        CorruptionError,
        "not valid JSON",
    ),
    "duplicate name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        CorruptionError,
        "'a' appears twice",
    ),
    "metadata no object": ({"__metadata__": []}, b"", CorruptionError, "__metadata__"),
    "metadata no strings": ({"__metadata__": {"n": 1}}, b"", CorruptionError, "__metadata__"),
    "entry no object": ({"a": 1}, b"", CorruptionError, "tensor 'a': expected exactly"),
    "field missing": ({"a": {"dtype": "F32"}}, b"", CorruptionError, "expected exactly"),
    "field unknown": (entry(extra=1), bytes(16), CorruptionError, "expected exactly"),
    "dtype no string": (entry(dtype=32), bytes(16), CorruptionError, "dtype: expected a string"),
    "dtype unknown": (entry(dtype="F31"), bytes(16), FormatError, "tensor 'a': dtype 'F31'"),
    "shape no list": (entry(shape=4), bytes(16), CorruptionError, "list of sizes"),
    "shape negative": (entry(shape=[-2, -2]), bytes(16), CorruptionError, "list of sizes"),
    "shape bool": (entry(shape=[True, 4]), bytes(16), CorruptionError, "list of sizes"),
    "shape float": (entry(shape=[2.0, 2]), bytes(16), CorruptionError, "list of sizes"),
    "shape overflows": (
        entry(shape=[1 << 62, 4]),
        bytes(16),
        CorruptionError,
        r"more than 2\*\*63",
    ),
    "shape overflows before a zero": (
        entry(shape=[1 << 62, 4, 0], data_offsets=[0, 0]),
        b"",
        CorruptionError,
        r"more than 2\*\*63",
    ),
    "shape in bytes overflows": (entry(shape=[1 << 62]), bytes(16), CorruptionError, "takes 184"),
    "name of half a pair": (
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        CorruptionError,
        "not valid Unicode",
    ),
    "shape disagrees": (entry(shape=[2, 3]), bytes(16), CorruptionError, "takes 24 bytes"),
    "offsets three": (entry(data_offsets=[0, 8, 16]), bytes(16), CorruptionError, "two offsets"),
    "offsets negative": (entry(data_offsets=[-16, 0]), bytes(16), CorruptionError, "two offsets"),
    "offsets reversed": (entry(data_offsets=[16, 0]), bytes(16), CorruptionError, "span -16"),
    "half a byte": (
        {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}},
        b"x",
        FormatError,
        "whole byte",
    ),
    "hole at the start": (entry(data_offsets=[4, 20]), bytes(20), CorruptionError, "hole"),
    "hole between": (
        {**GOOD, "b": {"dtype": "U8", "shape": [1], "data_offsets": [17, 18]}},
        bytes(18),
        CorruptionError,
        "'b' has a hole before it",
    ),
    "overlap": (
        {**GOOD, "b": {"dtype": "U8", "shape": [8], "data_offsets": [12, 20]}},
        bytes(20),
        CorruptionError,
        "'b' overlaps",
    ),
    "same bytes twice": ({**GOOD, "b": GOOD["a"]}, bytes(16), CorruptionError, "overlaps"),
    "bytes cut off": (GOOD, bytes(15), CorruptionError, "cut short"),
    "bytes left over": (GOOD, bytes(17), CorruptionError, "describes"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_header(case: str, tmp_path: Path) -> None:
    header, data, error, message = MALFORMED[case]
    file = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(error, match=message) as caught:
        read_header(file)
    assert type(caught.value) is error
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_file_too_short_for_a_length(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FormatError, match="at least 8"):
        read_header(tmp_path / "f")


def test_header_length_is_capped_before_it_is_allocated(tmp_path: Path) -> None:
    for length in (MAX_HEADER_BYTES + 1, (1 << 64) - 1):
        with pytest.raises(FormatError, match="at most"):
            read_header(write_raw(tmp_path / "f", b"{}", length=length))
    with pytest.raises(CorruptionError, match="cut short"):
        read_header(write_raw(tmp_path / "f", b"{}", length=3))


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@settings(max_examples=150)
@given(data=st.data())
def test_what_is_accepted_the_stock_library_accepts(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "f.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "bb": torch.ones(3, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'{}[],:"0123456789'))
    cut = data.draw(st.integers(0, 4))
    file.write_bytes(content[: len(content) - cut])
    try:
        tensors, _ = read_header(file)
        for tensor in tensors.values():
            assert b"".join(read_chunks(tensor, chunk_bytes=5)) == bytes(
                content[tensor.offset : tensor.offset + tensor.n_bytes]
            )
    except MoeboundError:
        return
    try:
        with safe_open(file, "pt") as stock:
            assert set(stock.keys()) == set(tensors)
    except SafetensorError as error:  # pragma: no cover - the message is what matters
        pytest.fail(f"accepted what the stock library refuses: {error}")


def test_reads_what_the_stock_library_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(4).half(),
        "f32": torch.randn(2, 3, 4),
        "f64": torch.randn(2).double(),
        "i64": torch.arange(3),
        "u8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "f8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt", "note": "ε"})
    found, metadata = read_header(tmp_path / "f.safetensors")
    assert metadata == {"format": "pt", "note": "ε"}
    assert set(found) == set(tensors)
    offsets = [tensor.offset for tensor in found.values()]
    assert offsets == sorted(offsets)
    for name, want in tensors.items():
        array = read_tensor(found[name])
        assert array.shape == tuple(want.shape)
        assert array.flags.owndata
        assert (
            array.tobytes() == want.contiguous().view(torch.uint8).numpy().tobytes()
            if (want.dim())
            else array == 1.5
        )


def test_dtypes_without_numpy_equivalent_can_be_copied_not_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    tensor = read_header(write_raw(tmp_path / "f", header, b"xy"))[0]["a"]
    assert b"".join(read_chunks(tensor)) == b"xy"
    with pytest.raises(FormatError, match="F4 has no NumPy equivalent"):
        read_tensor(tensor)


def test_slices_of_the_leading_axis(tmp_path: Path) -> None:
    want = torch.randn(4, 3, 5).bfloat16()
    save_file({"a": want}, tmp_path / "f.safetensors")
    tensor = read_header(tmp_path / "f.safetensors")[0]["a"]
    for e in range(4):
        got = read_tensor(tensor, e, drop_cache=True)
        assert got.shape == (3, 5)
        np.testing.assert_array_equal(got.view(np.uint16), want[e].view(torch.uint16).numpy())
    for e in (-1, 4):
        with pytest.raises(IndexError, match=f"no slice {e}"):
            read_tensor(tensor, e)


def test_read_into_checks_its_range(tmp_path: Path) -> None:
    tensor = read_header(write_raw(tmp_path / "f", GOOD, bytes(range(16))))[0]["a"]
    buffer = bytearray(4)
    read_into(tensor, memoryview(buffer), start=12)
    assert buffer == bytes([12, 13, 14, 15])
    for start in (-1, 13):
        with pytest.raises(ValueError, match="it has 16"):
            read_into(tensor, memoryview(buffer), start=start)


def test_file_that_shrinks_or_goes_after_its_header_was_read(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "f", GOOD, bytes(16))
    tensor = read_header(file)[0]["a"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CorruptionError, match="1 bytes more"):
        read_tensor(tensor)
    file.unlink()
    with pytest.raises(CheckpointError, match="tensor 'a' cannot be read"):
        read_tensor(tensor)


def test_threads_read_the_same_file(tmp_path: Path) -> None:
    want = torch.randn(64, 16, 16)
    save_file({"a": want}, tmp_path / "f.safetensors")
    tensor = read_header(tmp_path / "f.safetensors")[0]["a"]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda e: read_tensor(tensor, e), range(64)))
    np.testing.assert_array_equal(np.stack(parts), want.numpy())


# --- folders


def write_shards(folder: Path, weight_map: Any, *shards: str) -> Path:
    for shard in shards:
        save_file({shard: torch.ones(2)}, folder / f"{shard}.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_index_of_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"b": "b.safetensors", "a": "a.safetensors"}, "a", "b")
    assert [tensor.file.name for tensor in read_tensors(folder).values()] == [
        "a.safetensors",
        "b.safetensors",
    ]


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "C:a",
        "a\0b",
        7,
    ],
)
def test_index_that_leaves_its_folder(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CorruptionError, match="file beside the index"):
        read_tensors(write_shards(folder, {"a": shard}))


@pytest.mark.parametrize("weight_map", [None, [], {}, "a.safetensors"])
def test_index_without_a_weight_map(weight_map: Any, tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="weight_map"):
        read_tensors(write_shards(tmp_path, weight_map))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_index_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CorruptionError, match=INDEX_FILE):
        read_tensors(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}, "a")
    with pytest.raises(CheckpointError, match=r"shard b\.safetensors is missing"):
        read_tensors(folder)


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a": "a.safetensors", "c": "a.safetensors"}, "a")
    with pytest.raises(CheckpointError, match=r"tensor 'c' is not in a\.safetensors"):
        read_tensors(folder)


def test_tensors_that_the_index_leaves_out_are_kept(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "extra": torch.ones(3)}, tmp_path / "a.safetensors")
    folder = write_shards(tmp_path, {"a": "a.safetensors"})
    assert set(read_tensors(folder)) == {"a", "extra"}


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for shard in "ab":
        save_file({shard: torch.ones(2), "x": torch.ones(2)}, tmp_path / f"{shard}.safetensors")
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"}
    with pytest.raises(CheckpointError, match="does not say which one counts"):
        read_tensors(write_shards(tmp_path, weight_map))
    tensors = read_tensors(write_shards(tmp_path, weight_map | {"x": "b.safetensors"}))
    assert tensors["x"].file.name == "b.safetensors"


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only safetensors"):
        read_tensors(tmp_path)


MEASURE = """
import sys
from pathlib import Path
from moebound.checkpoint import read_header, read_tensor

def anonymous_mb():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

tensors = read_header(Path(sys.argv[1]))[0]
read_tensor(tensors["fused"], 0)
before = peak = anonymous_mb()
for e in range(tensors["fused"].shape[0]):
    expert = read_tensor(tensors["fused"], e, drop_cache=True)
    peak = max(peak, anonymous_mb())
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    shape, file = [150, 1024, 1024], tmp_path / "big.safetensors"  # 300 MB, 2 MB an expert
    size = 2 * int(np.prod(shape))
    write_raw(file, {"fused": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}})
    os.truncate(file, file.stat().st_size + size)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert float(result.stdout) < 8  # two experts alive, and slack


def test_many_names_of_which_the_last_stands_twice_take_few_comparisons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    def loads(text: str, *, object_pairs_hook: Any) -> Any:
        # The stock decoder's pairs, with names that count how often they are compared.
        def counted(pairs: list[tuple[str, Any]]) -> Any:
            return object_pairs_hook([(Name(name), value) for name, value in pairs])

        return stock(text, object_pairs_hook=counted)

    stock = json.loads
    n = 2000
    part = b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(part % i for i in (*range(n), n - 1)) + b"}"
    file = write_raw(tmp_path / "f", text)
    monkeypatch.setattr("moebound.checkpoint.shards.json.loads", loads)
    with pytest.raises(CorruptionError, match="'t1999' appears twice"):
        read_header(file)
    assert compared < 20 * n


def test_pipes_devices_and_folders_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in {"pipe": "a pipe", "zeros": "a device", "folder": "a folder"}.items():
        for read in (read_header, read_json):
            with pytest.raises(CheckpointError, match=f"expected an ordinary file, found {kind}"):
                read(tmp_path / name)
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    tensor = read_header(tmp_path / "t.safetensors")[0]["a"]
    (tmp_path / "t.safetensors").unlink()
    os.mkfifo(tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="found a pipe"):
        read_tensor(tensor)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in", "a web page"),
        (b"\n<HTML>", "a web page"),
        (b"", "an empty file; its download did not finish"),
        (b'{"error":"Repository not found"}', "a server's error"),
        (bytes(4096), "a file of zeros"),
        (b"PK\x03\x04" + bytes(600), "PyTorch's .bin files"),
    ],
)
def test_what_a_download_left_is_said(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read_header(tmp_path / "f")
    if content and not content.startswith(b"{"):
        with pytest.raises(CorruptionError, match=words):
            read_json(tmp_path / "f")


def test_json_is_capped_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as handle:
        handle.truncate(1 << 40)  # a hole, no bytes on disk
    with pytest.raises(CorruptionError, match=f"at most {MAX_JSON_BYTES}"):
        read_json(tmp_path / "config.json")


def test_long_json_of_brackets_is_not_parsed(tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * 400_000 + b"[]]}"
    with pytest.raises(CorruptionError, match="400003 lists and objects"):
        read_header(write_raw(tmp_path / "f", text))
    (tmp_path / "j").write_bytes(text)
    with pytest.raises(CorruptionError, match="at most one in 8 bytes"):
        read_json(tmp_path / "j")


def test_why_there_are_no_weights(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            read_tensors(tmp_path)

    (tmp_path / "pytorch_model.bin").touch()
    refused(r"only safetensors weights are read.*pytorch_model\.bin")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refused(f"{INDEX_FILE} has to say what belongs")
    (tmp_path / "adapter_model.safetensors").touch()
    refused("an adapter is there")
    (tmp_path / "model.safetensors.incomplete").touch()
    refused(r"model\.safetensors is missing, and model\.safetensors\.incomplete is there")
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    refused(r"is a link to ../../blobs/0123, which is not there")
