"""docs/format-method.md: its example is what is written, and a reader made from it reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebound.methods import (
    ExpertView,
    MatrixSpec,
    RouterEdit,
    compress_expert,
    get_method,
    method_class,
    method_ids,
)
from moebound.methods import blob as frame
from moebound.methods.blob import MatrixBlob, RouterBlob, SharedBlob, Use, blob_checksum
from moebound.methods.rtn import Rtn
from moebound.types import NUMPY_DTYPES, Array, DType, ExpertKey

TEXT = (Path(__file__).parents[2] / "docs" / "format-method.md").read_text(encoding="utf-8")
EXAMPLE, READER = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
KEY = ExpertKey(0, 0)


@pytest.fixture(scope="module")
def read_rtn() -> Any:
    names: dict[str, Any] = {}
    exec(compile(READER, "format-method.md, reader", "exec"), names)
    assert "moebound" not in READER
    return names["read_rtn"]


def test_the_example(capsys: pytest.CaptureFixture[str], read_rtn: Any) -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    assert capsys.readouterr().out.strip() in TEXT
    table = TEXT.split("## 7.")[1].split("## 8.")[0]
    cells = re.findall(r"^\| `([0-9a-f ]+)` \|", table, re.MULTILINE)
    assert " ".join(cells) == names["blob"].hex(" ")
    dtype, found = read_rtn(names["blob"])
    assert dtype == "BF16"
    wanted = [[-2, 0, 0, 4], [0.5, 0, 0, 0]]
    assert found.astype(ml_dtypes.bfloat16).astype(float).tolist() == wanted
    assert names["artifact"].weights(KEY)["gate"].astype(float).tolist() == wanted


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    cols=st.integers(1, 30),
    bits=st.integers(2, 8),
    group=st.integers(2, 200),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
)
@settings(max_examples=40)
def test_the_reader_reads_what_is_written(
    read_rtn: Any, seed: int, rows: int, cols: int, bits: int, group: int, dtype: DType
) -> None:
    weights = np.random.default_rng(seed).standard_normal((rows, cols)).astype(NUMPY_DTYPES[dtype])
    method = get_method(f"rtn:int{bits}:g{group}")
    artifact = compress_expert(method, ExpertView(KEY, {"up": weights}))
    found_dtype, found = read_rtn(artifact.experts[KEY]["up"].data)
    assert found_dtype == dtype
    rounded = found.astype(NUMPY_DTYPES[dtype])
    assert rounded.tobytes() == artifact.weights(KEY)["up"].tobytes()


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_frames_by_the_tables() -> None:
    """Written here from the page's tables, byte by byte."""
    payload = b"payload" * 40
    ending = varint(len(payload)) + payload
    part = SharedBlob("m_1", 7, 300, 2, 70_000, memoryview(payload)).build()
    assert part[:-4] == (
        b"MOEM\x01\x01\x03m_1\x07" + varint(300) + varint(2) + varint(70_000) + ending
    )
    uses = (Use(2, blob_checksum(part)), Use(0, 1))
    matrix = MatrixBlob("m_1", 7, (3, 500), "F16", 300, uses, memoryview(payload)).build()
    assert matrix[:-4] == (
        b"MOEM\x01\x00\x03m_1\x07\x01\x02" + varint(3) + varint(500) + varint(2) + varint(300)
        + varint(2) + part[-4:] + varint(0) + b"\x01\0\0\0" + ending
    )  # fmt: skip
    edit = RouterBlob("m_1", 7, 300, memoryview(payload)).build()
    assert edit[:-4] == b"MOEM\x01\x02\x03m_1\x07" + varint(300) + ending


def test_a_router_edit_by_the_table() -> None:
    head = b'{"layer":4,"keep":[0,2,3],"alias":{"2":0},"constants":[3]}\n'
    vector = np.array([1.5, -2.0], np.float32)
    edit = RouterEdit(4, (0, 2, 3), {2: 0}, {3: vector})
    assert edit.to_bytes() == head + vector.tobytes()
    again = RouterEdit.from_bytes(head + vector.tobytes())
    assert again.describe() == edit.describe()
    assert again.constants[3].tolist() == vector.tolist()
    for name in RouterEdit(0).describe():
        assert f"| `{name}` |" in TEXT


def test_hqq_by_the_table() -> None:
    rng = np.random.default_rng(0)
    scale, zero = rng.random(3).astype("<f2"), (7 * rng.random(3)).astype("<f2")
    codes = rng.integers(0, 256, 20).astype(np.uint8)
    payload = b"\x08\x00\x08" + scale.tobytes() + zero.tobytes() + codes.tobytes()
    own = np.arange(20) // 8
    wanted: Array = (codes.astype(np.float32) - zero[own]) * scale[own].astype(np.float32)
    found = method_class("hqq").decode(memoryview(payload), MatrixSpec((4, 5), "F32"), [])
    assert found.tobytes() == wanted.reshape(4, 5).tobytes()


def test_numbers_and_names() -> None:
    assert f"version of the frame, {frame.VERSION}" in TEXT
    assert f"`{frame.MAGIC.decode()}`" in TEXT
    assert f"at most {frame.MAX_USES} |" in TEXT
    for name in method_ids():
        if name == "bounded":
            assert "The method `bounded` writes envelopes" in TEXT
        elif method_class(name).__module__.startswith("moebound."):
            assert f"The payload of `{name}`, version {method_class(name).version}" in TEXT
    assert Rtn.version == 1
