"""Building the programs of this folder, and running them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = "check_attend", "check_bound", "check_cuszp", "check_frozen", "check_product"
PRODUCTS = 150, 20261129
SAID_OF_PRODUCTS = (
    "150 products, 9b49c2361cb213d3, d8c2c66f9053e33a, fdfb39de33163a0f, e830ad5c971236cc, "
    "e730e64841b51bbe\n"
)
"""check_product of these arguments: on every machine, with every instruction set."""
ATTENTION = 60, 20261130
SAID_OF_ATTENTION = "60 of attention, 877be53c2df1b0ba, 2251f7b8f17e13ec, exp within 8.27e-08\n"
"""check_attend of these, likewise."""


def build(
    folder: Path, *options: str, include: str = "", programs: tuple[str, ...] = PROGRAMS
) -> Path:
    """Configures and builds the programs; returns their folder. include: where to look, too."""
    environment = os.environ | ({"CPLUS_INCLUDE_PATH": include} if include else {})
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, "-DMOEBOUND_CHECKS=ON", *options],
        ["cmake", "--build", str(folder), "--target", *programs, "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "native"


def build_once(about: pytest.TempPathFactory, name: str, *options: str) -> Path:
    """As `build`, for all test processes of a run: the first builds, and the others wait."""
    folder = about.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder / name, *options)  # where all is built, that is a second


def run(*command: str | Path | int) -> str:
    """What a program says. It fails the test by its exit code."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
