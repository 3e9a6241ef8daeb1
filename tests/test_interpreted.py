"""Runs the tests of folders `interpreted/`: kernels on the CPU, under triton's interpreter.

TRITON_INTERPRET has to be set before triton is imported, and then holds for the whole process. So
they run in one of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(str(file.relative_to(HERE)) for file in HERE.glob("**/interpreted/test_*.py"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.slow
def test_under_the_interpreter(file: str) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
         str(HERE / file)],
        cwd=HERE.parent, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout
