"""What a model computes with, as options spell it."""

from __future__ import annotations

import torch

from moebound.errors import MoeboundError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype | str:
    """As `from_pretrained` takes it; "auto" is the checkpoint's own. Raises MoeboundError."""
    if name == "auto":
        return name
    if name not in DTYPES:
        raise MoeboundError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]
