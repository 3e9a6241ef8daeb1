"""docs/cache.md: its code runs, and its defaults and policies are the code's."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from moebound.cache import POLICIES, ZipfTrace

TEXT = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {"folder": tmp_path})


def test_policies_and_defaults() -> None:
    assert re.findall(r"^\| `([a-z-]+)`", TEXT, re.MULTILINE) == list(POLICIES)
    defaults = ", ".join(f"{name}={value:g}" for name, value in asdict(ZipfTrace()).items())
    assert defaults in " ".join(TEXT.split())
