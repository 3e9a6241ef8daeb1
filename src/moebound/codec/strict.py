"""Any codec, made to keep its bound after the cast: decode, look, and patch what broke."""

from __future__ import annotations

import numpy as np

from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.measure import violations
from moebound.errors import BoundError
from moebound.types import Array


def within_bound(
    codec: Codec, x: Array, spec: ArraySpec, *, threads: int = 1
) -> tuple[Payload, Array]:
    """The codec's payload with every miss listed, and the verbatim values of the misses.

    After the misses are put in place, every value is within spec.abs_bound of x, in spec.dtype.
    Raises BoundError if spec.dtype cannot hold a value that is.
    """
    payload = codec.compress(x, spec, threads=threads)
    if not codec.keeps_bound:
        decoded = np.empty(spec.size, spec.numpy_dtype)
        codec.decompress(memoryview(payload.data), spec, decoded, threads=threads)
        payload = Payload(payload.data, violations(x, decoded, spec.abs_bound))
    originals = x.reshape(-1)[payload.misses.astype(np.int64)]
    with np.errstate(over="ignore", invalid="ignore"):
        values = originals.astype(spec.numpy_dtype)
    beyond = violations(originals, values, spec.abs_bound)
    if len(beyond):
        at = int(payload.misses[int(beyond[0])])
        raise BoundError(
            f"bound {spec.abs_bound:g} cannot be met in {spec.dtype}: {len(beyond)} values, the "
            f"first at flat index {at}, are farther than that from every {spec.dtype} number; "
            f"ask for a wider bound or another dtype"
        )
    return payload, values
