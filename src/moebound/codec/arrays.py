"""NumPy arrays and torch tensors at the door: in as a NumPy view, out as what went in."""

from __future__ import annotations

import sys
from collections.abc import Iterable
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
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    try:
        found = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        return _NAMES[found.newbyteorder("=")]
    except (TypeError, ValueError, SyntaxError, KeyError):
        raise CodecError(f"dtype {name}: expected bfloat16, float16 or float32") from None


def to_numpy(array: ArrayLike) -> Array:
    """A C-contiguous NumPy array of the same values and dtype; a view where possible.

    Raises CodecError for other dtypes, for things that are no array, and for arrays of which some
    values are masked or not there: sparse tensors and those on device "meta".
    """
    if is_torch(array):
        import torch

        given: torch.Tensor = array.detach()  # type: ignore[union-attr]
        name = dtype_name(given.dtype)
        if given.layout != torch.strided or given.device.type == "meta":
            raise CodecError(
                f"expected a dense tensor with values, found {given.layout} on {given.device}"
            )
        tensor = given.cpu().contiguous().resolve_neg()
        if name == "BF16":
            return tensor.view(torch.int16).numpy().view(NUMPY_DTYPES["BF16"])
        return tensor.numpy()
    if not isinstance(array, np.ndarray):
        raise CodecError(f"expected a NumPy array or a torch tensor, found {type(array).__name__}")
    if isinstance(array, np.ma.MaskedArray):
        raise CodecError("expected an array without a mask, found a masked one; fill it first")
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
        import torch

        tensor: torch.Tensor = out.detach()  # type: ignore[union-attr]
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
        if not plain or tensor.is_neg() or not tensor.is_contiguous():
            raise CodecError("out: expected a contiguous tensor on the CPU")
        view = to_numpy(tensor)
        will_be_written([tensor])
    elif isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray):
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


def will_be_written(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd that these change behind its back: a backward pass that needs what was in them
    then raises, where it would compute another gradient without a word."""
    import torch

    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def refuse_overlap(out: Array, *read: memoryview | Array) -> None:
    """Raises CodecError if decoding into `out` would change what is being read.

    out: contiguous. read: contiguous too, so that the ends of both tell.
    """
    for source in read:
        if len(source) and np.may_share_memory(out, np.asarray(source)):
            raise CodecError("out: it overlaps the bytes that are decoded into it; copy either")
