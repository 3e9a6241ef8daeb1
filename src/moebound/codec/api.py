"""`encode` and `decode`: one array to bytes under a bound, and back.

resolve the bound -> codec.compress -> (strict: decode, find what broke) -> envelope
parse the envelope -> codec.decompress -> put the patch in place
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from moebound.codec import envelope, patch
from moebound.codec.arrays import (
    ArrayLike,
    dtype_name,
    is_torch,
    refuse_overlap,
    to_numpy,
    to_torch,
    writable_view,
)
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.certificate import Certificate, promised, sha256
from moebound.codec.checks import whole
from moebound.codec.envelope import Envelope
from moebound.codec.fields import as_bytes
from moebound.codec.measure import Distortion, measure, stats
from moebound.codec.registry import codec_class, get_codec
from moebound.codec.strict import within_bound
from moebound.errors import BoundError, BoundViolatedError, CodecError, CorruptionError, FormatError
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound, TensorStats

RMSE_ATTEMPTS = 12

UNASKED_BYTES, UNASKED_RATIO = 1 << 30, 1024
"""What a decoder makes of bytes where nobody says how much to expect: 1 GiB, or 1024 times the
bytes if that is more. A constant array of 1 GiB is a hundred bytes: a ratio alone would not do."""

MOST_THREADS = 1 << 16

_NUMBER = re.compile(r"[0-9]{1,9}")


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
    A bound wider than every weight is a bound: all of them may come back as 0.

    Raises BoundError if the bound is no finite number above 0 or dtype cannot meet it, CodecError
    for an unknown codec or an array it cannot take (more than 8 dimensions or 2^40 values, among
    others), BackendUnavailable if its library is missing, MemoryError.
    """
    if is_torch(array) or isinstance(array, np.ndarray):
        _check_shape(tuple(array.shape))  # before a copy is made of it
    x = to_numpy(array)
    bound = ErrorBound.of(bound)
    out_dtype = dtype_name(x.dtype if dtype is None else dtype)
    reference = TensorStats() if bound.mode == "abs" else stats(x)
    spec = ArraySpec(x.shape, out_dtype, dtype_name(x.dtype), _absolute(bound, reference))
    chosen = _codec(codec)
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

    array: NumPy array. reference: what a relative bound is relative to, the whole
    expert's statistics for scope "expert"; the array's own if None.

    Raises as `encode`; BoundViolatedError if the measured error exceeds the bound, which no codec
    here should ever let happen.
    """
    _check_shape(array.shape)
    array = to_numpy(array)
    threads = whole(threads, "threads", 1, MOST_THREADS)
    if reference is None and bound.mode != "abs":
        reference = stats(array)
    dtype = dtype_name(array.dtype)
    spec = ArraySpec(array.shape, dtype, dtype, _absolute(bound, reference or TensorStats()))
    chosen = _codec(codec)
    data = _encode(array, spec, chosen, from_torch=False, threads=threads)
    if not bound.pointwise and spec.size:
        data = _meet_rmse(array, spec, chosen, bound, data, from_torch=False, threads=threads)
    return certified(array, bound, data, threads=threads)


def certified(array: Array, bound: ErrorBound, data: bytes, *, threads: int = 1) -> Encoded:
    """An envelope of this array, decoded again and measured. bound: as it was asked for.

    Raises BoundViolatedError if the measured error exceeds the envelope's.
    """
    parsed = envelope.parse(data)
    spec = parsed.spec
    decoded = decode_array(parsed, threads=threads, max_bytes=spec.n_bytes)
    found = measure(array, decoded, spec.abs_bound)
    if found.broken and bound.pointwise:
        raise BoundViolatedError(
            f"codec {parsed.codec!r} broke its bound: {found.broken} of {spec.size} weights off by "
            f"more than {spec.abs_bound:g}, the worst by {found.max_abs_error:g}"
        )
    certificate = Certificate(
        guarantee=promised(bound, lossy=codec_class(parsed.codec).lossy),
        bound=bound,
        abs_bound=spec.abs_bound,
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


def decode(
    data: bytes | bytearray | memoryview,
    *,
    out: ArrayLike | None = None,
    max_bytes: int | None = None,
) -> ArrayLike:
    """The array again, in the dtype and shape it was encoded with.

    A torch tensor comes back where one went in, a NumPy array where one went in. out: decode into
    this contiguous array or tensor of the same shape and dtype, and return it; it shares no memory
    with data, and holds anything after an error. max_bytes: of the decoded array, the most that is
    made of data; None for 1 GiB, or 1024 times the bytes of data if that is more. With out, its
    shape is what was expected.

    Memory: the decoded array, and a small multiple of it and of data. Raises FormatError for an
    array beyond max_bytes, FormatError or CorruptionError on bytes that are not whole, CodecError
    if out does not fit or the codec is unknown here, MemoryError.
    """
    parsed = envelope.parse(data)
    if out is not None:
        view = writable_view(out, parsed.spec.shape, parsed.spec.dtype)
        refuse_overlap(view, as_bytes(data))
        decode_into(parsed, view)
        return out
    array = decode_array(parsed, max_bytes=max_bytes)
    return to_torch(array) if parsed.from_torch else array


def decode_array(
    parsed: Envelope, *, threads: int | None = None, max_bytes: int | None = None
) -> Array:
    """The values of a parsed envelope as a new NumPy array.

    max_bytes: as of `decode`. Who has compared the shape with what it has to be gives its bytes.
    Raises CorruptionError for a shape that so few bytes cannot fill, FormatError for one beyond
    max_bytes, both before asking for its memory.
    """
    check_claimed(parsed, max_bytes)
    with named_memory(f"decoding shape {parsed.spec.shape} of {parsed.spec.dtype}"):
        array = np.empty(parsed.spec.shape, NUMPY_DTYPES[parsed.spec.dtype])
    decode_into(parsed, array.reshape(-1), threads=threads)
    return array


def check_claimed(parsed: Envelope, max_bytes: int | None) -> None:
    """Compare the shape that bytes claim with what they can hold, and with what is wanted.

    Raises as `decode_array`.
    """
    most = codec_class(parsed.codec).most_weights(len(parsed.payload))
    if parsed.spec.size > most:
        raise CorruptionError(
            f"shape {parsed.spec.shape}: {len(parsed.payload)} bytes of codec {parsed.codec!r} "
            f"hold at most {most} values"
        )
    given = len(parsed.payload) + parsed.values.nbytes
    check_unasked(parsed.spec.shape, parsed.spec.dtype, given, max_bytes)


def check_unasked(
    shape: tuple[int, ...], dtype: DType, n_bytes: int, max_bytes: int | None
) -> None:
    """Whether n_bytes of input may become an array of this shape; max_bytes as of `decode`.

    Raises FormatError.
    """
    claimed = prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if max_bytes is None:
        limit = max(UNASKED_BYTES, UNASKED_RATIO * n_bytes)
    else:
        limit = whole(max_bytes, "max_bytes", 0, 1 << 62)
    if claimed > limit:
        hint = "; max_bytes= allows more" if max_bytes is None else ""
        raise FormatError(
            f"{n_bytes} bytes say shape {shape} of {dtype}, {claimed} bytes: at most {limit} were "
            f"expected{hint}"
        )


def decode_into(parsed: Envelope, out: Array, *, threads: int | None = None) -> None:
    """Decode a parsed envelope into a flat, contiguous array of its dtype and size.

    Raises CodecError if out is another, or overlaps the bytes that were parsed.
    """
    spec = parsed.spec
    fits = out.shape == (spec.size,) and out.dtype == spec.numpy_dtype
    if not fits or not (out.flags.c_contiguous and out.flags.writeable):
        raise CodecError(
            f"out: expected a writable, contiguous array of {spec.size} values of {spec.dtype}, "
            f"found shape {out.shape} of {out.dtype}"
        )
    refuse_overlap(out, parsed.payload, parsed.values.view(np.uint8))
    cls = codec_class(parsed.codec)
    if parsed.codec_version > cls.newest():
        raise FormatError(
            f"codec {parsed.codec!r} version {parsed.codec_version}: "
            f"this moebound reads up to version {cls.newest()}"
        )
    if spec.size:
        chosen = thread_count() if threads is None else threads
        n_threads = whole(chosen, "threads", 1, MOST_THREADS)
        with named_memory(f"decoding shape {spec.shape} of {spec.dtype}"):
            cls().decompress(parsed.payload, spec, out, threads=n_threads)
        patch.apply(out, parsed.misses, parsed.values)
    elif len(parsed.payload):
        raise CorruptionError(f"{len(parsed.payload)} bytes for an empty array")


def thread_count() -> int:
    """Native threads to use: MOEBOUND_THREADS if set, else the CPUs this process may run on."""
    wanted = os.environ.get("MOEBOUND_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not _NUMBER.fullmatch(wanted) or not 1 <= int(wanted) <= MOST_THREADS:
        raise CodecError(
            f"MOEBOUND_THREADS={wanted!r}: expected a whole number above 0, at most {MOST_THREADS}"
        )
    return int(wanted)


def _codec(codec: str | Codec) -> Codec:
    if isinstance(codec, str):
        return get_codec(codec)
    if not isinstance(codec, Codec):
        raise CodecError(f"codec {codec!r}: expected an id or a Codec, see codec_ids()")
    return codec


def _check_shape(shape: tuple[int, ...]) -> None:
    if fault := envelope.shape_fault(shape):
        raise CodecError(f"{fault}; reshape or split the array")


@contextmanager
def named_memory(what: str) -> Iterator[None]:
    """A MemoryError stays one, and says what there was no memory for."""
    try:
        yield
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        raise MemoryError(f"{what}: out of memory{reason}") from error


def _absolute(bound: ErrorBound, reference: TensorStats) -> float:
    absolute = bound.absolute(reference)
    if absolute == float("inf"):
        raise BoundError(f"{bound}: as an absolute bound that is inf, beyond float64")
    return absolute


def _encode(x: Array, spec: ArraySpec, codec: Codec, *, from_torch: bool, threads: int) -> bytes:
    if spec.abs_bound == 0.0 and codec.lossy:
        # A relative bound on an all-zero tensor: only an exact copy keeps it.
        codec = get_codec("lossless")
    with named_memory(f"encoding shape {spec.shape} of {spec.source_dtype}"):
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
    parsed = envelope.parse(data)
    decoded = decode_array(parsed, threads=threads, max_bytes=parsed.spec.n_bytes)
    return measure(x, decoded, abs_bound)


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
