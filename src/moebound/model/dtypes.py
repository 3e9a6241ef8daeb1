"""What a model computes with, and where, as options spell it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from moebound.checkpoint.families import Role
from moebound.codec.arrays import to_numpy, torch_dtype
from moebound.errors import MoeboundError
from moebound.types import NUMPY_DTYPES, Array, DType

DTYPES = {dtype.name: torch_dtype(name) for name, dtype in NUMPY_DTYPES.items()}


def parse_dtype(name: str) -> torch.dtype | str:
    """As `from_pretrained` takes it; "auto" is the checkpoint's own. Raises MoeboundError."""
    if name == "auto":
        return name
    if name not in DTYPES:
        raise MoeboundError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def arrays_of(
    weights: Mapping[Role, torch.Tensor], dtype: DType | None = None
) -> dict[Role, Array]:
    """The weights as they would stand in their checkpoint. dtype: of it; found out if None."""
    stored = torch_dtype(dtype or stored_dtype(weights))
    return {role: to_numpy(matrix.to(stored)) for role, matrix in weights.items()}


def stored_dtype(weights: Mapping[Role, torch.Tensor]) -> DType:
    """The dtype that an expert's weights come from: the narrowest that holds them all exactly.

    A bfloat16 checkpoint loaded in float32 is told by its values, all of which bfloat16 has.
    Where both 16-bit dtypes would do, it is bfloat16.
    """
    return next(
        name
        for name, dtype in ((name, torch_dtype(name)) for name in NUMPY_DTYPES)
        if all(
            w.dtype == dtype or bool(((w.to(dtype).to(w.dtype) == w) | w.isnan()).all())
            for w in weights.values()
        )
    )


def check_device(name: str, *, also: Collection[str] = ()) -> None:
    """Raises MoeboundError for a device that this torch does not know or have. also: other words
    that an option takes."""
    if name in also:
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        expected = ", ".join(("cpu", "cuda", *also))
        raise MoeboundError(
            f"device {name!r}: expected one as torch spells it ({expected})"
        ) from error
    try:
        torch.empty(1, device=device)
    except Exception as error:  # AssertionError on a build for CPUs, NotImplementedError, ...
        built = "" if torch.version.cuda else ", a build without CUDA"
        raise MoeboundError(
            f"device {name!r}: torch {torch.__version__}{built} cannot use it here: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
