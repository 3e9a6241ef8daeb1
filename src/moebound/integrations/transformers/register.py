"""Make transformers know stores, whichever of the two packages is imported first.

`import moebound` must not import transformers (seconds), and must still be enough for
`from_pretrained` to load a store. So if transformers' table of quantizers is loaded, the store is
entered now; if not, a finder waits for that one module and enters it right after the module has
run. The finder changes nothing else about the import, and leaves when its work is done.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"
"""The module with the tables; everything in transformers that loads a model imports it."""

ENTERING = "moebound.integrations.transformers.hf"


def register() -> None:
    """Enter stores into transformers' tables, now or as soon as it is imported. Idempotent."""
    module = sys.modules.get(TARGET)
    if module is not None and not _is_loading(module):
        _enter()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter() -> None:
    """Raises nothing: an unknown transformers must stay importable. Says so in a warning."""
    entering = sys.modules.get(ENTERING)
    if entering is not None and _is_loading(entering):
        return
    try:
        importlib.import_module(ENTERING).register()
    except Exception as error:
        warnings.warn(
            f"moebound: from_pretrained of this transformers cannot load stores "
            f"({type(error).__name__}: {error}); `moebound decompress` makes ordinary checkpoints",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Finder:
    """Finds TARGET as the others do, and adds a step behind its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                break
        else:
            return None
        loader = spec.loader
        if loader is None or not hasattr(loader, "exec_module"):
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _enter()

        # On this loader object only, which importlib made for this one module.
        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
