"""Builds check_bound.cpp and check_cuszp.cpp and lets them loose on the kernel: every path against
the scalar one, on good bytes and on damaged ones, under sanitizers. A long run: `check_bound CASES
MUTATIONS SEED`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def build(folder: Path, *options: str, include: str = "") -> Path:
    """Configures and builds the programs; returns their folder. include: where to look, too."""
    environment = os.environ | ({"CPLUS_INCLUDE_PATH": include} if include else {})
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, "-DMOEBOUND_CHECKS=ON", *options],
        [
            "cmake",
            "--build",
            str(folder),
            "--target",
            "check_bound",
            "check_cuszp",
            "--parallel",
            "2",
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "native"


def check(program: Path, cases: int, mutations: int, seed: int) -> str:
    done = subprocess.run(
        [program, str(cases), str(mutations), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), "-DMOEBOUND_SANITIZE=ON")


def test_damaged_payloads_of_bound_under_sanitizers(sanitized: Path) -> None:
    said = check(sanitized / "check_bound", 400, 20, 20261122)
    assert said.startswith("400 arrays")


def test_damaged_streams_of_cuszp_under_sanitizers(sanitized: Path) -> None:
    said = check(sanitized / "check_cuszp", 300, 20, 20261126)
    assert said.startswith("300 arrays")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is x86-64")
def test_the_avx512_path_in_plain_c(tmp_path: Path) -> None:
    simde = pytest.importorskip("simde_py", reason="needs SIMDe: pip install simde-py")
    emulated = build(
        tmp_path / "build", "-DMOEBOUND_EMULATE_AVX512=ON", include=simde.get_include()
    )
    said = check(emulated / "check_bound", 300, 10, 20261123)
    assert "avx512" in said
