"""Builds the programs of this folder and lets them loose on the kernel: every path against
the scalar one, on good bytes and on damaged ones, under sanitizers. A long run: `check_bound CASES
MUTATIONS SEED`."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
from frozen import N_ENCODED, write_frozen
from programs import (
    ATTENTION,
    PRODUCTS,
    SAID_OF_ATTENTION,
    SAID_OF_PRODUCTS,
    build,
    build_once,
    run,
)

from codec.kernel import ISAS

COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the PATH"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_once(tmp_path_factory, "sanitized", "-DMOEBOUND_SANITIZE=ON")


@pytest.mark.slow
def test_damaged_payloads_of_bound_under_sanitizers(sanitized: Path) -> None:
    said = run(sanitized / "check_bound", 400, 20, 20261122)
    assert said.startswith("400 arrays")


@pytest.mark.slow
def test_bytes_and_values_of_the_module_in_use(sanitized: Path, tmp_path: Path) -> None:
    write_frozen(tmp_path / "frozen")
    assert f"{N_ENCODED * len(ISAS)} encoded" in run(
        sanitized / "check_frozen", tmp_path / "frozen"
    )


@pytest.mark.slow
def test_products_of_codes_under_sanitizers(sanitized: Path) -> None:
    assert run(sanitized / "check_product", *PRODUCTS) == SAID_OF_PRODUCTS


@pytest.mark.slow
def test_attention_under_sanitizers(sanitized: Path) -> None:
    assert run(sanitized / "check_attend", *ATTENTION) == SAID_OF_ATTENTION


@pytest.mark.slow
def test_damaged_streams_of_cuszp_under_sanitizers(sanitized: Path) -> None:
    said = run(sanitized / "check_cuszp", 300, 20, 20261126)
    assert said.startswith("300 arrays")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is x86-64")
@(pytest.mark.long if "avx512" in ISAS else pytest.mark.slow)  # such a processor ran it above
def test_the_avx512_path_in_plain_c(tmp_path: Path) -> None:
    simde = pytest.importorskip("simde_py", reason="needs SIMDe: pip install simde-py")
    emulated = build(
        tmp_path / "build", "-DMOEBOUND_EMULATE_AVX512=ON", include=simde.get_include(),
        programs=("check_bound",),
    )  # fmt: skip
    said = run(emulated / "check_bound", 300, 10, 20261123)
    assert "avx512" in said
