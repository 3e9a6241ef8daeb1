"""moebound: error-bounded compression of the experts of Mixture-of-Experts language models.

    moebound.compress("SRC", "DST", bound=moebound.ErrorBound(0.1, "rate", "expert"))
    moebound.verify("DST", against="SRC").ok
    with moebound.load("DST", ram_budget="20%") as offloaded: ...

Importing this package imports none but the standard library: what a name stands for is imported
when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moebound.errors import (
    BackendUnavailable,
    BoundError,
    BoundViolatedError,
    CacheError,
    CheckpointError,
    CodecError,
    CorruptionError,
    FormatError,
    MethodError,
    MoeboundError,
    PlanError,
    SizeError,
    StoreError,
    TaskError,
    UnsupportedArchitectureError,
)
from moebound.integrations.transformers import register

if TYPE_CHECKING:
    from moebound.checkpoint import open_checkpoint
    from moebound.codec import codec_ids, decode, encode
    from moebound.integrations.transformers.compressing import MoeboundConfig
    from moebound.offload import load
    from moebound.store.decompress import decompress
    from moebound.store.reader import open_store
    from moebound.store.verify import verify
    from moebound.store.writer import compress
    from moebound.types import ErrorBound, ExpertKey

register()  # from_pretrained on a store, whichever package is imported first

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BoundError",
    "BoundViolatedError",
    "CacheError",
    "CheckpointError",
    "CodecError",
    "CorruptionError",
    "ErrorBound",
    "ExpertKey",
    "FormatError",
    "MethodError",
    "MoeboundConfig",
    "MoeboundError",
    "PlanError",
    "SizeError",
    "StoreError",
    "TaskError",
    "UnsupportedArchitectureError",
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
]

_HOMES = {
    "checkpoint": ["open_checkpoint"],
    "codec": ["codec_ids", "decode", "encode"],
    "integrations.transformers.compressing": ["MoeboundConfig"],
    "offload": ["load"],
    "store": ["compress", "decompress", "open_store", "verify"],
    "types": ["ErrorBound", "ExpertKey"],
}
"""The modules that are imported on use, and what is public of each."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name == home or name in names:
            module = import_module(f"{__name__}.{home}")
            globals()[name] = found = module if name == home else getattr(module, name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
