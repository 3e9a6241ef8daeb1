"""`cuszp`: the published 1-D stream of cuSZp, written anew.

cuSZp (Huang et al., "cuSZp: An Ultra-fast GPU Error-bounded Lossy Compression Framework with
Optimized End-to-End Performance", SC 2023; "cuSZp2", SC 2024) quantizes with steps of 2ε, and
stores blocks of 32 bins as signs and as many bit-planes as the largest of them needs. It is made
for the speed of a GPU. Without an entropy coder, every weight of a block pays for the largest.

    fixed    the bins themselves: the smallest on weights, which look like noise
    plain    the difference to the bin before it in the block
    outlier  as plain, and a large first value of a block is kept apart

All three decode to the same values. Bits per weight, 2048x1408 bf16 N(0,1) with row scales, patch
included (bench/results/cuszp.json has more):

    rate   entropy   fixed   plain   outlier
    0.05   5.737     6.674   7.130   7.130
    0.3    3.165     4.156   4.574   4.573
    0.8    1.826     2.965   3.373   3.373

`encode_stream` and `decode_stream` have the bare stream, as the library gives and takes it;
docs/format-cuszp.md has its bytes, and what is done otherwise here; `reference/cuszp.py` is the
same in NumPy, `device/cuszp.py` on a GPU.

Left out: the 2-D and 3-D layouts, float64, and the stream of version 1.
"""

from __future__ import annotations

import struct
from typing import ClassVar, Self

import numpy as np

from moebound import _native
from moebound.codec.arrays import to_numpy
from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.checks import whole
from moebound.codec.fields import as_bytes
from moebound.codec.rounding import smallest_with_patch
from moebound.errors import BoundError, CodecError, CorruptionError
from moebound.types import Array, as_float

MODES = ("fixed", "plain", "outlier")
"""In the order of the published library's numbers for them: 0, 1, 2."""

BLOCK = 32
CHUNK = 32 * 1024
"""Weights; the table of rates has a byte for each block of them, for whole chunks."""

_HEADER = struct.Struct("<Bf")
"""Of a payload: mode and ε."""

SMALLEST_BOUND, LARGEST_BOUND = 2.0**-126, 2.0**125
"""Between them 2ε and 0.5/ε are normal float32 numbers, on every machine."""


def encode_stream(x: Array, abs_bound: float, *, mode: str = "plain") -> bytes:
    """The bare stream of cuSZp for float32 values of any shape, in C order.

    abs_bound: ε in weight units, rounded to float32 as the library takes it. The stream says
    neither the number of values nor ε nor the mode: whoever decodes has to know them.

    The bytes are those of the library for all values within 2^30 steps. The bound is the
    library's too: it may be missed by float32's rounding, and is for values of 2^23 steps and
    more; bins end at ±2^30. NaN and ±Inf are coded as 0. Raises BoundError, CodecError.
    """
    flat = to_numpy(x).reshape(-1)
    if flat.dtype != np.float32:
        raise CodecError(f"cuszp: expected float32, found {x.dtype}")
    code = MODES.index(check_mode(mode))
    return _native.cuszp_encode(flat, check_bound(abs_bound), code, True, 1)  # type: ignore[no-any-return]


def decode_stream(
    data: bytes | bytearray | memoryview, n: int, abs_bound: float, *, mode: str = "plain"
) -> Array:
    """The n float32 values, flat, of a stream that `encode_stream` or the library made.

    Raises CorruptionError on bytes that neither can have made: rates are summed and compared with
    the length before anything is allocated for them; BoundError, CodecError.
    """
    bound = check_bound(abs_bound)
    check_mode(mode)
    view = as_bytes(data)
    if check_count(n) < 0 or len(view) < table_n_bytes(n):
        raise CorruptionError(f"cuszp: {len(view)} bytes cannot hold {n} values")
    out = np.empty(n, np.float32)
    _decode(view, out, bound, mode, whole_chunks=True, threads=1)
    return out


def check_bound(abs_bound: float) -> float:
    """ε as a float32 number. Raises BoundError if it is not between 2^-126 and 2^125."""
    if not SMALLEST_BOUND <= as_float(abs_bound) <= LARGEST_BOUND:
        raise BoundError(f"cuszp: bound {abs_bound}: expected 2^-126 to 2^125")
    return float(np.float32(abs_bound))


def check_count(n: int) -> int:
    """A number of values, itself; below 0 it is left to who counts bytes. Raises CodecError for
    what is no whole number."""
    return whole(n, "cuszp: n", -(1 << 62), 1 << 62)


def check_mode(mode: str) -> str:
    """The mode itself. Raises CodecError if there is none of that name."""
    if mode not in MODES:
        raise CodecError(f"cuszp: mode {mode!r} unknown, expected one of {', '.join(MODES)}")
    return mode


def table_n_bytes(n: int) -> int:
    """Bytes of the table of rates in a stream of n values."""
    return -(-n // CHUNK) * (CHUNK // BLOCK)


class CuszpCodec(Codec):
    """cuSZp's stream behind its mode and ε, without the zeros that fill up its table.

    bfloat16 and float16 are widened, which is exact, and values are rounded to the nearest after
    decoding, which is not; `strict.py` patches what that rounding, the quantizer's own and the
    ends of its range break. Where that is often, ε is a little smaller than asked (`rounding.py`).
    A bound beyond what a stream can have is quantized at the nearest it can: what then breaks a
    smaller bound is patched, and a larger one is kept all the more.
    """

    id: ClassVar[str] = "cuszp"

    def __init__(self, mode: str = "plain") -> None:
        self.mode = check_mode(mode)

    @classmethod
    def from_options(cls, options: str) -> Self:
        """``plain``, ``fixed`` or ``outlier``; plain if nothing."""
        return cls(options or "plain")

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """A byte of the table for each block."""
        return max(0, n_bytes - _HEADER.size) * BLOCK

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        if spec.abs_bound == 0.0:
            raise CodecError("codec cuszp: bound 0 asks for an exact copy; use lossless")
        flat = x.reshape(-1)
        if spec.source_dtype == "BF16":
            flat = flat.view(np.uint16)
        code = MODES.index(self.mode)

        def payload(within: float) -> bytes:
            bound = check_bound(min(max(within, SMALLEST_BOUND), LARGEST_BOUND))
            stream = _native.cuszp_encode(flat, bound, code, False, threads)
            return _HEADER.pack(code, bound) + stream  # type: ignore[no-any-return]

        return Payload(smallest_with_patch(self, x, spec, spec.abs_bound, payload, threads=threads))

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        if len(data) < _HEADER.size:
            raise CorruptionError(f"cuszp: expected a header of {_HEADER.size} bytes")
        code, bound = _HEADER.unpack_from(data)
        if code >= len(MODES) or not SMALLEST_BOUND <= bound <= LARGEST_BOUND:
            raise CorruptionError(
                f"cuszp: expected mode 0 to {len(MODES) - 1} and a bound of 2^-126 to 2^125, "
                f"found {code} and {bound:g}"
            )
        values = out.view(np.uint16) if spec.dtype == "BF16" else out
        stream = data[_HEADER.size :]
        _decode(stream, values, bound, MODES[code], whole_chunks=False, threads=threads)

    def __repr__(self) -> str:
        return f"CuszpCodec({self.mode!r})"


def _decode(
    data: bytes | bytearray | memoryview,
    out: Array,
    bound: float,
    mode: str,
    *,
    whole_chunks: bool,
    threads: int,
) -> None:
    """out: float32, float16, or uint16 for bfloat16's patterns; flat.

    whole_chunks: whether the table is filled up to them.
    """
    try:
        _native.cuszp_decode(data, out, bound, MODES.index(mode), whole_chunks, threads)
    except _native.Corrupt as error:
        raise CorruptionError(f"cuszp: {error}") from None
