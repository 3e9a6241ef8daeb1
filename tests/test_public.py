"""What `import moebound` gives: the names, and what it does not import for them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import moebound
from moebound import errors
from tiny_models import MakeTiny

ERRORS = {
    "BackendUnavailable",
    "BoundError",
    "BoundViolatedError",
    "CacheError",
    "CheckpointError",
    "CodecError",
    "CorruptionError",
    "FormatError",
    "MethodError",
    "MoeboundError",
    "PlanError",
    "SizeError",
    "StoreError",
    "TaskError",
    "UnsupportedArchitectureError",
}
NAMES = {
    "ErrorBound",
    "ExpertKey",
    "MoeboundConfig",
    "__version__",
    "codec_ids",
    "compress",
    "decode",
    "decompress",
    "encode",
    "load",
    "open_checkpoint",
    "open_store",
    "verify",
}


def test_the_public_names() -> None:
    assert set(moebound.__all__) == NAMES | ERRORS
    assert len(moebound.__all__) == len(NAMES | ERRORS)
    assert set(moebound.__all__) <= set(dir(moebound))
    for name in moebound.__all__:
        assert getattr(moebound, name) is not None


def test_every_error_is_public() -> None:
    own = [
        e for _, e in inspect.getmembers(errors, inspect.isclass) if e.__module__ == errors.__name__
    ]
    assert {error.__name__ for error in own} == ERRORS
    assert all(getattr(moebound, error.__name__) is error for error in own)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'moebound' has no attribute 'comprez'"):
        _ = moebound.comprez


def imported(code: str) -> set[str]:
    """The modules that are loaded after `code`, in a new interpreter, and not without it."""
    shown = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    found = [
        subprocess.run([sys.executable, "-c", f"{first}\n{shown}"], capture_output=True, check=True)
        for first in (code, "")
    ]
    after, before = (set(json.loads(run.stdout)) for run in found)
    return after - before


def test_importing_moebound_imports_nothing_else() -> None:
    found = {name for name in imported("import moebound")
             if name.partition(".")[0] not in sys.stdlib_module_names}  # fmt: skip
    assert found == {
        "moebound",
        "moebound.errors",
        "moebound.integrations",
        "moebound.integrations.transformers",
        "moebound.integrations.transformers.register",
    }


@pytest.mark.parametrize("name", ["encode", "ErrorBound", "open_checkpoint", "compress", "load"])
def test_a_name_is_imported_on_use_and_without_torch(name: str) -> None:
    found = imported(f"import moebound; moebound.{name}")
    assert "numpy" in found or name == "load"
    assert not {"torch", "transformers", "huggingface_hub", "click", "matplotlib"} & found


def test_modules_are_there_without_an_import_of_their_own() -> None:
    imported(
        "import moebound; moebound.codec.get_codec; moebound.store.Store; moebound.types.DType"
    )


def test_verbs_take_paths(tiny: MakeTiny, tmp_path: Path) -> None:
    src, dst, out = tiny("mixtral"), tmp_path / "dst", tmp_path / "out"
    bound = moebound.ErrorBound(0.1, "rate", "expert")
    moebound.compress(str(src), str(dst), bound=bound)
    assert moebound.open_store(dst).settings.source == src.name
    assert moebound.verify(str(dst), against=str(src)).ok
    assert moebound.verify(dst, against=src).ok
    assert moebound.verify(dst, against=moebound.open_checkpoint(src)).ok
    moebound.decompress(dst, out)
    assert not moebound.verify(dst, against=out).ok  # the decoded weights are not the original
    with pytest.raises(moebound.CheckpointError, match="no such file or folder"):
        moebound.compress(tmp_path / "none", tmp_path / "again", bound=bound)


def test_a_built_in_model_has_its_name(tmp_path: Path) -> None:
    checkpoint = moebound.open_checkpoint("builtin:wordmath")
    assert checkpoint.name == "builtin:wordmath"
    assert moebound.open_checkpoint(checkpoint) is checkpoint
    with pytest.raises(moebound.CheckpointError, match="no such built-in model"):
        moebound.compress("builtin:other", tmp_path, bound=moebound.ErrorBound(0.1))
