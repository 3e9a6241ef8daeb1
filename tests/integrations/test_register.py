"""Whichever package is imported first, transformers knows stores; and moebound stays light."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

KNOWN = """
from transformers.quantizers import auto
assert "moebound" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert "moebound" in auto.AUTO_QUANTIZER_MAPPING
assert not [f for f in sys.meta_path if type(f).__module__.startswith("moebound")]
"""


def run(program: str, *, path: Path | None = None) -> None:
    """Run it in a new interpreter, in which our warnings are errors; path goes before all."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", "import sys\n" + program],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]


REGISTER = "from moebound.integrations.transformers import register; register()"


@pytest.mark.parametrize(
    "first",
    [
        f"{REGISTER}; import transformers",
        f"import transformers.modeling_utils; {REGISTER}",
        f"{REGISTER}; import moebound.integrations.transformers.hf",
    ],
)
def test_either_order(first: str) -> None:
    run(first + KNOWN)


def test_registering_imports_neither_transformers_nor_torch() -> None:
    run(
        "from moebound.integrations.transformers import register; register()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a package `transformers` that has the one module, and notes its import."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "auto.py").write_text("ran = [1]\ntable = {}\n")
    (package / "other.py").write_text("")
    return tmp_path


# What enters itself into the stand-in's table.
ENTER = """
import types
hf = types.ModuleType("moebound.integrations.transformers.hf")
def enter():
    import transformers.quantizers.auto as auto
    auto.table["entered"] = auto.table.get("entered", 0) + 1
hf.register = enter
sys.modules["moebound.integrations.transformers.hf"] = hf
from moebound.integrations.transformers import register
"""


@pytest.mark.parametrize(
    "program",
    [
        "register(); register(); import transformers; assert len(sys.meta_path) == n + 1",
        "import transformers; register(); import transformers.quantizers.other",
        "register(); from transformers.quantizers import auto",
        "register(); import threading; from concurrent.futures import ThreadPoolExecutor as P\n"
        "with P(8) as p: list(p.map(__import__, ['transformers.quantizers.auto'] * 8))",
    ],
)
def test_entered_once_and_only_after_the_module_has_run(program: str, stand_in: Path) -> None:
    after = textwrap.dedent(
        """
        import inspect, transformers.quantizers.auto as auto
        assert auto.table == {"entered": 1}, auto.table
        assert len(sys.meta_path) == n
        assert auto.__spec__.origin == auto.__file__
        assert "ran = " in inspect.getsource(auto)
        """
    )
    run(f"n = len(sys.meta_path)\n{ENTER}\n{program}\n{after}", path=stand_in)


def test_a_missing_transformers_is_missing_as_ever(stand_in: Path) -> None:
    (stand_in / "transformers" / "quantizers" / "auto.py").unlink()
    program = textwrap.dedent(
        """
        register()
        try:
            import transformers.quantizers.auto
        except ModuleNotFoundError as error:
            assert error.name == "transformers.quantizers.auto"
        else:
            raise AssertionError
        """
    )
    run(ENTER + program, path=stand_in)


def test_an_unknown_transformers_stays_importable(stand_in: Path) -> None:
    program = textwrap.dedent(
        """
        import warnings
        from moebound.integrations.transformers import register
        register()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import transformers.quantizers.auto as auto
        assert auto.ran
        assert any("cannot load stores" in str(w.message) for w in seen)
        """
    )
    run(program, path=stand_in)
