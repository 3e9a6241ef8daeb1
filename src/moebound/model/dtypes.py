"""What a model computes with, as options spell it."""

from __future__ import annotations

import torch

from moebound.codec.arrays import torch_dtype
from moebound.errors import MoeboundError
from moebound.types import NUMPY_DTYPES

DTYPES = {dtype.name: torch_dtype(name) for name, dtype in NUMPY_DTYPES.items()}


def parse_dtype(name: str) -> torch.dtype | str:
    """As `from_pretrained` takes it; "auto" is the checkpoint's own. Raises MoeboundError."""
    if name == "auto":
        return name
    if name not in DTYPES:
        raise MoeboundError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]
