"""docs/store.md: its code runs, and the names it uses are the ones in the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from moebound.codec import Certificate
from moebound.methods import router_name, shared_name
from moebound.store.format import (
    CERTIFICATES_FILE,
    SHARD_MARK,
    SLICE_MARK,
    VERSION,
    FileRecord,
    MatrixRecord,
    PartRecord,
    RouterRecord,
    Settings,
    ShardRecord,
    TensorRecord,
)
from moebound.types import ErrorBound, Guarantee

from .conftest import MakeSource

TEXT = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")


def test_the_code_runs(source: MakeSource, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {"source": source(), "folder": tmp_path})
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_names_and_version() -> None:
    words = [CERTIFICATES_FILE, f"up_proj{SLICE_MARK}3"]
    words += [f'"{SHARD_MARK}": "{version}"' for version in range(1, VERSION + 1)]
    words += [
        name.replace("7", "G").replace("9", "P") for name in (shared_name(7, 9), router_name(7))
    ]
    for word in words:
        assert f"{word}`" in TEXT, word
    assert f"| `version` | of the store, {VERSION};" in TEXT


def test_every_field_is_there() -> None:
    rows = re.findall(r"^\| (`[a-z_0-9`, ]+`) \| (.*)\|$", TEXT, re.MULTILINE)
    by_name = {name: rest for names, rest in rows for name in re.findall(r"`(\w+)`", names)}
    of_certificate = {field.name for field in fields(Certificate)}
    of_matrix = {field.name for field in fields(MatrixRecord)}
    settings = Settings("m", ErrorBound(1.0), False, "r", plan="p", source="s").to_json()
    assert of_certificate | of_matrix | set(settings) | set(get_args(Guarantee)) <= set(by_name)
    records = {
        "part": PartRecord, "router": RouterRecord, "tensor": TensorRecord, "shard": ShardRecord,
        "file": FileRecord,
    }  # fmt: skip
    for kind, record in records.items():
        assert {field.name for field in fields(record)} <= set(
            re.findall(r"`(\w+)`", by_name[kind])
        )
