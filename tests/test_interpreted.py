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
FILES = sorted(HERE.glob("**/interpreted/test_*.py"))
FOLDERS = sorted({str(file.parent.relative_to(HERE)) for file in FILES})
LONG = [str(file.relative_to(HERE)) for file in FILES if "mark.long" in file.read_text()]


def interpreted(what: str, marks: str) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
         "-m", marks, str(HERE / what)],
        cwd=HERE.parent, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.slow
def test_under_the_interpreter(folder: str) -> None:
    interpreted(folder, "not long")


@pytest.mark.parametrize("file", LONG)
@pytest.mark.long
def test_the_long_ones_under_the_interpreter(file: str) -> None:
    interpreted(file, "long")
