"""Packages that only some uses need: where each belongs, and what is said where one is missing.

They are imported where they are used, through `need`. pyproject.toml lists the same extras.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import Any

from moebound.errors import BackendUnavailable

PACKAGES = {
    "matplotlib": ("matplotlib", "study"),
    "math_verify": ("math-verify", "study"),
    "pysz": ("pysz", "peers"),
    "zfpy": ("zfpy", "peers"),
    "hqq": ("hqq", "peers"),
    "gguf": ("gguf", "gguf"),
    "llama_cpp": ("llama-cpp-python", "peers"),
    "llguidance": ("llguidance", "serve"),
    "prometheus_client": ("prometheus-client", "serve"),
    "ray": ("ray", "ray"),
    "triton": ("triton", "gpu"),
    "lm_eval": ("lm-eval", "lm-eval"),
    "pyarrow": ("pyarrow", "parquet"),
}
"""Module -> the package that has it, and the extra of ours that installs it."""


def need(module: str, what: str) -> Any:
    """Import a module, or one inside of it: "hqq.core.quantize".

    what: needs it, as the message calls it. Raises BackendUnavailable where it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise unavailable(what, module.partition(".")[0], reason=error) from error


def check(what: str, *modules: str) -> None:
    """Make sure that modules are there, without importing them. Raises BackendUnavailable."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise unavailable(what, *missing)


def unavailable(what: str, *modules: str, reason: ImportError | None = None) -> BackendUnavailable:
    """The error of what cannot be done without these modules, all of one extra.

    reason: why they cannot be imported, which is not always that they are not installed.
    """
    packages = " and ".join(PACKAGES[module][0] for module in modules)
    extra = PACKAGES[modules[0]][1]
    said = "" if reason is None else f" ({reason})"
    return BackendUnavailable(
        f"{what} needs {packages}: pip install '.[{extra}]' in a checkout of moebound{said}"
    )
