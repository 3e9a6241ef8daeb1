"""Envelopes of codec `bound` in one native call: taken apart, checked, decoded and patched.

`envelope.parse` and the decoders behind it are the reference, and say what is wrong with bytes.
Taking an envelope apart in Python costs several times more beside decoding than by itself, because
decoding leaves nothing of the interpreter in the processor's caches (docs/offload.md, "Where a miss
spends its time"). What the native call does not take, for whatever reason, the reference reads.
"""

from __future__ import annotations

import numpy as np

from moebound import _native
from moebound.codec.bound import DTYPE_CODES
from moebound.codec.codes import Bits, CodeMatrix
from moebound.types import NUMPY_DTYPES, Array, DType

Data = bytes | bytearray | memoryview


def decode_at_once(data: Data, out: Array, shape: tuple[int, ...], *, threads: int) -> bool:
    """Decode an envelope of an array of this shape into `out`, flat and of its dtype.

    False, with anything in `out`, for every envelope that `bound` cannot decode so: damaged bytes,
    another shape or dtype, another codec, an exact copy.
    """
    patterns = out.view(np.uint16) if out.dtype == NUMPY_DTYPES["BF16"] else out
    return bool(_native.decode_envelope(data, patterns, shape, threads))


def codes_at_once(
    data: Data, out: Array, shape: tuple[int, int], dtype: DType, *, bits: Bits = 8, threads: int
) -> CodeMatrix | None:
    """As `decode_at_once`, a matrix into codes of so many bits. None, too, where it has none."""
    found = _native.decode_envelope_codes(data, out, shape, DTYPE_CODES[dtype], bits, threads)
    if found is None:
        return None
    table, steps, by_row, first, patched, patch_weights, factors = found
    return CodeMatrix(
        out, shape, dtype, table, steps, by_row, first, patched, patch_weights, factors, bits
    )
