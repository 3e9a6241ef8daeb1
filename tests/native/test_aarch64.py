"""The kernel, cross built for 64-bit ARM and run under an emulator: NEON against the scalar path,
and both against the bytes that this machine writes.

    apt-get install g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from frozen import N_ENCODED, write_frozen
from programs import ATTENTION, PRODUCTS, ROOT, SAID_OF_ATTENTION, SAID_OF_PRODUCTS, build_once, run

NEEDED = "cmake", "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in NEEDED if shutil.which(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not on the PATH: {', '.join(MISSING)}"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    toolchain = ROOT / "native" / "aarch64-linux-gnu.cmake"
    return build_once(tmp_path_factory, "aarch64", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")


def emulated(program: Path, *arguments: str | Path | int) -> str:
    return run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, *arguments)


def test_bytes_and_values_are_those_of_this_machine(programs: Path, tmp_path: Path) -> None:
    write_frozen(tmp_path / "frozen")
    said = emulated(programs / "check_frozen", tmp_path / "frozen")
    assert said.startswith(f"{2 * N_ENCODED} encoded")
    assert said.endswith("paths: scalar neon\n")


def test_neon_is_the_scalar_path(programs: Path) -> None:
    said = emulated(programs / "check_bound", 150, 10, 20261129)
    assert said.startswith("150 arrays")
    assert said.endswith("paths: scalar neon\n")


def test_products_are_those_of_other_machines(programs: Path) -> None:
    assert emulated(programs / "check_product", *PRODUCTS) == SAID_OF_PRODUCTS


def test_attention_is_that_of_other_machines(programs: Path) -> None:
    assert emulated(programs / "check_attend", *ATTENTION) == SAID_OF_ATTENTION


def test_cuszp_on_arm(programs: Path) -> None:
    assert emulated(programs / "check_cuszp", 60, 5, 20261129).startswith("60 arrays")
