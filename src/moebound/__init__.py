"""moebound: error-bounded compression of the experts of Mixture-of-Experts language models."""

from moebound.codec import codec_ids, decode, encode
from moebound.errors import (
    BackendUnavailable,
    BoundError,
    BoundViolatedError,
    CheckpointError,
    CodecError,
    CorruptionError,
    FormatError,
    MoeboundError,
    PlanError,
    StoreError,
    UnsupportedArchitectureError,
)
from moebound.integrations.transformers import register
from moebound.offload import load
from moebound.types import ErrorBound, ExpertKey

register()  # from_pretrained on a store, whichever package is imported first

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "BoundError",
    "BoundViolatedError",
    "CheckpointError",
    "CodecError",
    "CorruptionError",
    "ErrorBound",
    "ExpertKey",
    "FormatError",
    "MoeboundError",
    "PlanError",
    "StoreError",
    "UnsupportedArchitectureError",
    "__version__",
    "codec_ids",
    "decode",
    "encode",
    "load",
]
