"""docs/store.md: its code runs, and the names it uses are the ones in the code."""

from __future__ import annotations

import re
from pathlib import Path

from moebound.store.format import CERTIFICATES_FILE, SHARD_MARK, SLICE_MARK, VERSION

from .conftest import MakeSource

TEXT = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")


def test_the_code_runs(source: MakeSource, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {"source": source(), "folder": tmp_path})
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_names_and_version() -> None:
    for word in (CERTIFICATES_FILE, f'"{SHARD_MARK}": "{VERSION}"', f"up_proj{SLICE_MARK}3"):
        assert f"{word}`" in TEXT, word
    assert f"`version` ({VERSION})" in TEXT
