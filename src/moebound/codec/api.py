"""`encode` and `decode`: one array to bytes under a bound, and back.

resolve the bound -> codec.compress -> (strict: decode, find what broke) -> envelope
parse the envelope -> codec.decompress -> put the patch in place
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moebound.codec import envelope, patch
from moebound.codec.arrays import (
    ArrayLike,
    dtype_name,
    is_torch,
    to_numpy,
    to_torch,
    writable_view,
)
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.certificate import Certificate, promised, sha256
from moebound.codec.envelope import Envelope
from moebound.codec.measure import Distortion, measure, stats
from moebound.codec.registry import codec_class, get_codec
from moebound.codec.strict import within_bound
from moebound.errors import BoundError, BoundViolatedError, CodecError, CorruptionError, FormatError
from moebound.types import NUMPY_DTYPES, Array, ErrorBound, TensorStats

RMSE_ATTEMPTS = 12


@dataclass(frozen=True)
class Encoded:
    """Encoded bytes with what was measured on them.

    data: the envelope. certificate: the promise, as measured by decoding `data` again. decoded:
    what it decodes to, in the array's shape and dtype.
    """

    data: bytes
    certificate: Certificate
    decoded: Array


def encode(
    array: ArrayLike,
    bound: float | ErrorBound,
    *,
    codec: str | Codec = "bound",
    dtype: Any = None,
) -> bytes:
    """Compress one array so that no value moves by more than the bound.

    array: NumPy array or torch tensor of bfloat16 (NumPy: ml_dtypes), float16 or float32, any
        shape. bound: a float is absolute, in weight units. codec: an id, with options behind a
        colon, see `codec_ids()`. dtype: of the decoded values, the array's own if None; the
        bound holds after the cast to it.

    Guarantee, for a pointwise bound ε: max|array - decode(...)| <= ε in float64; NaN and ±Inf
    come back bit for bit; -0.0 may come back as 0.0. The bytes are the same on every machine.

    Raises BoundError if the bound is no finite number above 0 or dtype cannot meet it, CodecError
    for an unknown codec or an array it cannot take, BackendUnavailable if its library is missing.
    """
    x = to_numpy(array)
    bound = ErrorBound.of(bound)
    out_dtype = dtype_name(x.dtype if dtype is None else dtype)
    reference = TensorStats() if bound.mode == "abs" else stats(x)
    spec = ArraySpec(x.shape, out_dtype, dtype_name(x.dtype), _absolute(bound, reference))
    chosen = get_codec(codec) if isinstance(codec, str) else codec
    torch_in, threads = is_torch(array), thread_count()
    data = _encode(x, spec, chosen, from_torch=torch_in, threads=threads)
    if bound.pointwise or spec.size == 0:
        return data
    return _meet_rmse(x, spec, chosen, bound, data, from_torch=torch_in, threads=threads)


def encode_certified(
    array: Array,
    bound: ErrorBound,
    *,
    codec: str | Codec = "bound",
    reference: TensorStats | None = None,
    threads: int = 1,
) -> Encoded:
    """`encode`, then decode again, measure, and write down what was kept.

    array: C-contiguous NumPy array. reference: what a relative bound is relative to, the whole
    expert's statistics for scope "expert"; the array's own if None.

    Raises as `encode`; BoundViolatedError if the measured error exceeds the bound, which no codec
    here should ever let happen.
    """
    if reference is None and bound.mode != "abs":
        reference = stats(array)
    dtype = dtype_name(array.dtype)
    spec = ArraySpec(array.shape, dtype, dtype, _absolute(bound, reference or TensorStats()))
    chosen = get_codec(codec) if isinstance(codec, str) else codec
    data = _encode(array, spec, chosen, from_torch=False, threads=threads)
    if not bound.pointwise and spec.size:
        data = _meet_rmse(array, spec, chosen, bound, data, from_torch=False, threads=threads)
    parsed = envelope.parse(data)
    decoded = decode_array(parsed, threads=threads)
    found = measure(array, decoded, parsed.spec.abs_bound)
    if found.broken and bound.pointwise:
        raise BoundViolatedError(
            f"codec {parsed.codec!r} broke its bound: {found.broken} of {spec.size} weights off by "
            f"more than {spec.abs_bound:g}, the worst by {found.max_abs_error:g}"
        )
    certificate = Certificate(
        guarantee=promised(bound, lossy=codec_class(parsed.codec).lossy),
        bound=bound,
        abs_bound=parsed.spec.abs_bound,
        max_abs_error=found.max_abs_error,
        rmse=found.rmse,
        method=f"bounded:{parsed.codec}",
        method_version=1,
        codec=parsed.codec,
        codec_version=parsed.codec_version,
        dtype=spec.dtype,
        source_dtype=spec.source_dtype,
        shape=spec.shape,
        patched=len(parsed.misses),
        n_bytes=len(data),
        sha256_original=sha256(array.reshape(-1).view(np.uint8)),
        sha256_encoded=sha256(data),
    )
    return Encoded(data, certificate, decoded)


def decode(data: bytes | bytearray | memoryview, *, out: ArrayLike | None = None) -> ArrayLike:
    """The array again, in the dtype and shape it was encoded with.

    A torch tensor comes back where one went in, a NumPy array where one went in. out: decode into
    this contiguous array or tensor of the same shape and dtype, and return it.

    Raises FormatError or CorruptionError on bytes that are not whole, CodecError if out does not
    fit or the codec is unknown here.
    """
    parsed = envelope.parse(data)
    if out is not None:
        decode_into(parsed, writable_view(out, parsed.spec.shape, parsed.spec.dtype))
        return out
    array = decode_array(parsed)
    return to_torch(array) if parsed.from_torch else array


def decode_array(parsed: Envelope, *, threads: int | None = None) -> Array:
    """The values of a parsed envelope as a new NumPy array.

    Raises CorruptionError for a shape that so few bytes cannot fill, before asking for its memory.
    """
    most = codec_class(parsed.codec).most_weights(len(parsed.payload))
    if parsed.spec.size > most:
        raise CorruptionError(
            f"shape {parsed.spec.shape}: {len(parsed.payload)} bytes of codec {parsed.codec!r} "
            f"hold at most {most} values"
        )
    array = np.empty(parsed.spec.shape, NUMPY_DTYPES[parsed.spec.dtype])
    decode_into(parsed, array.reshape(-1), threads=threads)
    return array


def decode_into(parsed: Envelope, out: Array, *, threads: int | None = None) -> None:
    """Decode a parsed envelope into a flat, contiguous array of its dtype and size."""
    cls = codec_class(parsed.codec)
    if parsed.codec_version > cls.version:
        raise FormatError(
            f"codec {parsed.codec!r} version {parsed.codec_version}: "
            f"this moebound reads up to version {cls.version}"
        )
    if parsed.spec.size:
        n_threads = thread_count() if threads is None else threads
        cls().decompress(parsed.payload, parsed.spec, out, threads=n_threads)
        patch.apply(out, parsed.misses, parsed.values)
    elif len(parsed.payload):
        raise CorruptionError(f"{len(parsed.payload)} bytes for an empty array")


def thread_count() -> int:
    """Native threads to use: MOEBOUND_THREADS if set, else the CPUs this process may run on."""
    wanted = os.environ.get("MOEBOUND_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not wanted.isdigit() or int(wanted) < 1:
        raise CodecError(f"MOEBOUND_THREADS={wanted!r}: expected a whole number above 0")
    return int(wanted)


def _absolute(bound: ErrorBound, reference: TensorStats) -> float:
    absolute = bound.absolute(reference)
    if absolute == float("inf"):
        raise BoundError(f"{bound}: as an absolute bound that is inf, beyond float64")
    return absolute


def _encode(x: Array, spec: ArraySpec, codec: Codec, *, from_torch: bool, threads: int) -> bytes:
    if spec.abs_bound == 0.0 and codec.lossy:
        # A relative bound on an all-zero tensor: only an exact copy keeps it.
        codec = get_codec("lossless")
    if spec.size == 0:
        payload, values = Payload(b""), np.empty(0, spec.numpy_dtype)
    else:
        payload, values = within_bound(codec, x, spec, threads=threads)
    return envelope.build(
        Envelope(
            spec,
            codec.id,
            codec.version,
            memoryview(payload.data),
            payload.misses,
            values,
            from_torch,
        )
    )


def _measure(x: Array, data: bytes, abs_bound: float, threads: int) -> Distortion:
    return measure(x, decode_array(envelope.parse(data), threads=threads), abs_bound)


def _meet_rmse(
    x: Array,
    spec: ArraySpec,
    codec: Codec,
    bound: ErrorBound,
    data: bytes,
    *,
    from_torch: bool,
    threads: int,
) -> bytes:
    """Lower ε until the measured RMSE is within the promise; the first try is usually enough."""
    target = bound.value * stats(x).rms
    for _ in range(RMSE_ATTEMPTS):
        found = _measure(x, data, spec.abs_bound, threads).rmse
        if found <= target:
            return data
        spec = replace(spec, abs_bound=spec.abs_bound * min(0.98, target / found))
        data = _encode(x, spec, codec, from_torch=from_torch, threads=threads)
    raise BoundError(f"{bound}: codec {codec.id!r} does not reach it, RMSE is {found:g}")
