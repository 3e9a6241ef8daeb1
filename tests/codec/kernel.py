"""The native kernel of codec `bound`, called by tests below the envelope and the fallback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from moebound import _native
from moebound.codec.arrays import dtype_name
from moebound.codec.bound import DTYPE_CODES
from moebound.types import NUMPY_DTYPES, Array, DType

ISAS: list[str] = _native.runnable_isas()
SEGMENT_WEIGHTS = 1 << 18


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Run the kernel's code for this instruction set, and go back."""
    before = _native.isa()
    _native.use_isa(isa)
    try:
        yield
    finally:
        _native.use_isa(before)


def kernel_encode(
    array: Array,
    bound: float,
    *,
    dtype: DType | None = None,
    columns: int | None = None,
    segment_weights: int = SEGMENT_WEIGHTS,
    threads: int = 1,
) -> tuple[bytes, npt.NDArray[np.uint64]]:
    """The payload and the misses. columns: the last axis if None."""
    if columns is None:
        columns = array.shape[-1] if array.ndim else 1
    code = DTYPE_CODES[dtype or dtype_name(array.dtype)]
    return _native.bound_encode(  # type: ignore[no-any-return]
        flat(array), code, bound, columns, segment_weights, threads
    )


def kernel_decode(
    payload: bytes,
    n: int,
    bound: float,
    *,
    dtype: DType,
    source: DType | None = None,
    threads: int = 1,
) -> npt.NDArray[Any]:
    """The patterns of n values. Raises _native.Corrupt."""
    out = np.zeros(n, NUMPY_DTYPES[dtype])
    code = DTYPE_CODES[source or dtype]
    _native.bound_decode(payload, flat(out), code, bound, threads)
    return out.view(f"u{out.itemsize}")


def flat(array: Array) -> Array:
    """As the kernel takes it: bfloat16 as its bits."""
    values = array.reshape(-1)
    return values.view(np.uint16) if array.dtype == NUMPY_DTYPES["BF16"] else values
