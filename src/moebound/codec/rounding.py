"""Room for rounding: a smaller bound for a codec whose output is rounded to 16 bits after it.

Values that a codec puts nearly ε away from the original may be farther than that once they are
rounded, and the patch has to keep each of them. Where there are many, a stream at a slightly
smaller bound is larger, but less so than its patch is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from moebound.codec.base import ArraySpec, Codec
from moebound.codec.measure import violations
from moebound.codec.patch import positions_n_bytes
from moebound.types import Array

_STEP = 0.97
_MAX_STEPS = 8


def smallest_with_patch(
    codec: Codec,
    x: Array,
    spec: ArraySpec,
    bound: float,
    stream_at: Callable[[float], bytes],
    *,
    threads: int = 1,
) -> bytes:
    """The stream at `bound`, or in steps of _STEP below it, at which stream and patch are smallest.

    x: as the caller has it. stream_at: a payload of `codec` for it, at most so far from it before
    rounding. threads: to decode with. The first bound from which the next step does not gain is
    taken.
    """
    stream = stream_at(bound)
    if spec.dtype == "F32":
        return stream
    n_patch = _patch_n_bytes(codec, x, stream, spec, threads)
    # A step costs log2(1/_STEP) bits a weight: with less of a patch there is nothing to win.
    for _ in range(_MAX_STEPS):
        if 8 * n_patch <= -math.log2(_STEP) * spec.size:
            break
        bound *= _STEP
        narrower = stream_at(bound)
        n_patch_narrower = _patch_n_bytes(codec, x, narrower, spec, threads)
        if len(narrower) + n_patch_narrower >= len(stream) + n_patch:
            break
        stream, n_patch = narrower, n_patch_narrower
    return stream


def _patch_n_bytes(codec: Codec, x: Array, stream: bytes, spec: ArraySpec, threads: int) -> int:
    """Bytes that the envelope's patch will take beside this stream."""
    decoded = np.empty(spec.size, spec.numpy_dtype)
    codec.decompress(memoryview(stream), spec, decoded, threads=threads)
    count = len(violations(x, decoded, spec.abs_bound))
    return positions_n_bytes(spec.size, count) + count * decoded.itemsize if count else 0
