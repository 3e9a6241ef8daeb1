"""NumPy arrays and torch tensors at the door: in as a NumPy view, out as what went in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

from moebound.errors import CodecError
from moebound.types import NUMPY_DTYPES, Array, DType

if TYPE_CHECKING:
    import torch

ArrayLike: TypeAlias = "Array | torch.Tensor"

_NAMES: dict[np.dtype[Any], DType] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def is_torch(array: object) -> bool:
    """Whether it is a torch tensor. Does not import torch: who has a tensor has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_name(dtype: object) -> DType:
    """The safetensors spelling of a NumPy or torch dtype, or of one of its names.

    Raises CodecError for any dtype that is not bfloat16, float16 or float32.
    """
    if isinstance(dtype, str) and dtype.upper() in NUMPY_DTYPES:
        return dtype.upper()  # type: ignore[return-value]
    name = str(dtype).removeprefix("torch.")
    try:
        found = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        return _NAMES[found.newbyteorder("=")]
    except (TypeError, KeyError):
        raise CodecError(f"dtype {name}: expected bfloat16, float16 or float32") from None


def to_numpy(array: ArrayLike) -> Array:
    """A C-contiguous NumPy array of the same values and dtype; a view where possible.

    Raises CodecError for other dtypes and for things that are no array.
    """
    if is_torch(array):
        import torch

        tensor: torch.Tensor = array.detach().cpu().contiguous()  # type: ignore[union-attr]
        name = dtype_name(tensor.dtype)
        if name == "BF16":
            return tensor.view(torch.int16).numpy().view(NUMPY_DTYPES["BF16"])
        return tensor.numpy()
    if not isinstance(array, np.ndarray):
        raise CodecError(f"expected a NumPy array or a torch tensor, found {type(array).__name__}")
    name = dtype_name(array.dtype)
    return np.ascontiguousarray(array, dtype=NUMPY_DTYPES[name]).reshape(array.shape)


def torch_dtype(dtype: DType) -> torch.dtype:
    """As torch has it, by the same name as NumPy."""
    import torch

    found: torch.dtype = getattr(torch, NUMPY_DTYPES[dtype].name)
    return found


def to_torch(array: Array) -> torch.Tensor:
    """A torch tensor over the same memory."""
    import torch

    if array.dtype == NUMPY_DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def writable_view(out: ArrayLike, shape: tuple[int, ...], dtype: DType) -> Array:
    """The memory of `out` as a flat NumPy array to decode into.

    Raises CodecError unless it is C-contiguous, writable, on the CPU and of that shape and dtype.
    """
    if is_torch(out):
        tensor: torch.Tensor = out.detach()  # type: ignore[union-attr]
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise CodecError("out: expected a contiguous tensor on the CPU")
        view = to_numpy(tensor)
    elif isinstance(out, np.ndarray):
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise CodecError("out: expected a C-contiguous, writable array")
        view = out
    else:
        raise CodecError(f"out: expected an array or a tensor, found {type(out).__name__}")
    if view.shape != shape or view.dtype != NUMPY_DTYPES[dtype]:
        raise CodecError(
            f"out: expected shape {shape} and dtype {dtype}, found {view.shape}, {view.dtype}"
        )
    return view.reshape(-1)
