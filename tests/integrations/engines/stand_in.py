"""The engines' modules as far as they are recorded: names, bases, signatures; none of their code.

Where an engine is installed, tests take the real one.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from abc import ABC, ABCMeta, abstractmethod
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

RECORDS = {
    name: json.loads(Path(__file__).with_name(f"{name}.json").read_text("utf-8"))
    for name in ("vllm", "sglang")
}


def put_in_place(engine: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Make an engine importable. Whether it is the real one."""
    if importlib.util.find_spec(engine) is not None:
        return True
    for module, names in RECORDS[engine]["names"].items():
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[:n])
            if name not in sys.modules:
                made = ModuleType(name)
                made.__path__ = []
                monkeypatch.setitem(sys.modules, name, made)
        _fill(sys.modules[module], names)
    entered: dict[str, Any] = {}
    if engine == "vllm":
        _entering(sys.modules["vllm.model_executor.model_loader"], "register_model_loader", entered)
        _entering(
            sys.modules["vllm.model_executor.layers.quantization"],
            "register_quantization_config",
            entered,
        )
        config: Any = sys.modules["vllm.config.vllm"]
        config.get_current_vllm_config_or_none = lambda: None
        sys.modules["vllm"].entered = entered  # type: ignore[attr-defined]
    else:
        hooks = sys.modules["sglang.srt.plugins.hook_registry"]
        hooks.HookRegistry.register = classmethod(
            lambda cls, target, hook, kind: entered.__setitem__(target, (hook, kind))
        )
        hooks.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
        sys.modules["sglang"].entered = entered  # type: ignore[attr-defined]
        sys.modules["sglang.srt.layers.quantization"].QUANTIZATION_METHODS = {}  # type: ignore[attr-defined]
    return False


def _entering(module: ModuleType, name: str, entered: dict[str, Any]) -> None:
    """A function that gives a decorator, which keeps what it gets."""

    def register(key: str) -> Any:
        def keep(cls: Any) -> Any:
            entered[f"{name} {key}"] = cls
            return cls

        return keep

    setattr(module, name, register)


def _fill(module: ModuleType, names: dict[str, str]) -> None:
    """Classes in the order of the file, so that a base is there before what is built on it."""
    for dotted, said in names.items():
        owner: Any = module
        *path, leaf = dotted.split(".")
        for name in path:
            owner = (
                owner.__dict__.get(name) if isinstance(owner, type) else getattr(owner, name, None)
            )
            if owner is None:
                break
        if owner is None:
            continue
        if said.startswith("class("):
            bases = said.removeprefix("class(").removesuffix(")")
            known = tuple(getattr(module, base) for base in [bases] if hasattr(module, base))
            setattr(owner, leaf, _class(leaf, bases, known, names))


def _class(name: str, bases: str, known: tuple[Any, ...], names: dict[str, str]) -> type:
    if "nn.Module" in bases or name == "LinearBase":
        return type(name, (torch.nn.Module,), {})
    own = {
        dotted.removeprefix(f"{name}."): said
        for dotted, said in names.items()
        if dotted.startswith(f"{name}.") and said.endswith(")")
    }
    space: dict[str, Any] = {
        dotted.removeprefix(f"{name}."): ast.literal_eval(said)
        for dotted, said in names.items()
        if dotted.startswith(f"{name}.") and said and not said.endswith(")") and _literal(said)
    }
    for method, said in own.items():
        if method == "__init__":
            space[method] = _init
        elif "." not in method and not said.startswith("class("):
            made: Any = _raising(method)
            made = abstractmethod(made) if "@abstractmethod" in said else made
            for kind in (classmethod, staticmethod):
                made = kind(made) if f"@{kind.__name__}" in said else made
            space[method] = made
    made_class: type = ABCMeta(name, known or (ABC,), space)
    return made_class


def _literal(said: str) -> bool:
    try:
        ast.literal_eval(said)
    except (ValueError, SyntaxError):
        return False
    return True


def _init(self: Any, load_config: Any = None) -> None:
    self.load_config = load_config
    self.local_expert_ids = None  # of vLLM


def _raising(name: str) -> Any:
    def method(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(name)

    return method
