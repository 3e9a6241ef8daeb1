"""An encoded array as a GPU needs it: every length checked on the host, nothing left but numbers.

A kernel cannot raise, and must not read outside its buffers. So all that bytes can claim is parsed
here, by the native kernel, before anything is launched: the header, the classes, the tables, where
each segment's states, words and planes are, the positions of the patch. What is left to the device
are states and words, and there no value can lead it astray (docs/gpu.md).

Needs neither torch nor triton. Parsing takes well under a millisecond for a matrix of an expert;
a `Stream` may be kept and put into any number of plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moebound import _native
from moebound.codec import envelope
from moebound.codec.api import check_claimed, decode_array, named_memory
from moebound.codec.base import ArraySpec
from moebound.codec.bound import DTYPE_CODES, EXACT, BoundCodec
from moebound.codec.envelope import Envelope
from moebound.codec.lossless import LosslessCodec
from moebound.errors import CodecError, CorruptionError, FormatError
from moebound.types import Array

Numbers = npt.NDArray[Any]

MOST_LANES = 32


@dataclass(frozen=True)
class Coded:
    """The coded part of an array, for the decoder of docs/format.md, section 4.6.

    table_log ... class_base: of the header. columns: of the matrix that rows and columns mean.
    row_classes, column_classes: uint8, empty if there is one table.
    symbols: [n_tables, n_symbols] uint32, (frequency - 1) | cumulative frequency << 12.
    values: patterns by symbol << low_bits | low, uint16 or uint32; empty for an exact copy, whose
        bins are patterns rotated left by one, and where there are steps.
    steps: float32, of each column, or of each row if by_row; empty but in versions 2 and 3, whose
        values are bins times steps.
    factors: float32, of the other side, which steps are multiplied by; empty but in version 3.
    segments: [S] int64, the first byte of each segment, counted from the envelope's first byte.
    words: [S] int32, 16-bit words of each.
    lower: where the low halves of an exact copy of float32 begin, uint16 each; -1 without them.
    """

    table_log: int
    lanes_log: int
    low_bits: int
    n_tables: int
    columns: int
    rows_per_segment: int
    symbol_low: int
    class_base: int
    row_classes: Numbers
    column_classes: Numbers
    symbols: Numbers
    values: Numbers
    segments: Numbers
    words: Numbers
    lower: int
    steps: Numbers
    factors: Numbers
    by_row: bool

    @property
    def exact(self) -> bool:
        return len(self.values) == len(self.steps) == 0


@dataclass(frozen=True)
class Stream:
    """One envelope, taken apart for the device.

    spec: dtype, shape and bound. n_bytes: of the envelope. coded: None where the host has decoded
    the array instead, to `decoded`: codecs other than `bound` and `lossless`, and empty arrays.
    positions, patches: the envelope's patch, flat positions and patterns as uint32.
    """

    spec: ArraySpec
    codec: str
    n_bytes: int
    coded: Coded | None
    decoded: Array | None
    positions: npt.NDArray[np.int64]
    patches: npt.NDArray[np.uint32]

    @property
    def alignment_offset(self) -> int:
        """Segments begin at multiples of 4 if the envelope's first byte is so far behind one."""
        if self.coded is None:
            return 0
        return int(-self.coded.segments[0] % 4)


def read_stream(data: bytes | bytearray | memoryview, *, max_bytes: int | None = None) -> Stream:
    """Parse and check an envelope of any codec.

    max_bytes: as of `moebound.decode`: the host takes memory in proportion to the array, and a
    caller will take it for the array. Raises FormatError or CorruptionError as that does, except
    for what only decoding can find: damaged states and words, which the device reports.
    """
    parsed = envelope.parse(data)
    coder = next((c for c in (BoundCodec, LosslessCodec) if c.id == parsed.codec), None)
    n_bytes = memoryview(data).nbytes
    if coder is None or parsed.spec.size == 0:
        decoded = decode_array(parsed, max_bytes=max_bytes)
        return _stream(parsed, n_bytes, None, decoded.reshape(-1))
    if parsed.codec_version > coder.newest():
        raise FormatError(
            f"codec {parsed.codec!r} version {parsed.codec_version}: "
            f"this moebound reads up to version {coder.newest()}"
        )
    check_claimed(parsed, max_bytes)
    # The payload is the last thing in front of the checksum.
    begin = n_bytes - 4 - len(parsed.payload)
    with named_memory(f"reading shape {parsed.spec.shape} of {parsed.spec.dtype}"):
        return _stream(parsed, n_bytes, _coded(parsed, begin), None)


def _stream(parsed: Envelope, n_bytes: int, coded: Coded | None, decoded: Array | None) -> Stream:
    positions, values = parsed.misses, parsed.values
    if coded is None:
        positions, values = positions[:0], values[:0]  # decode_array has put them in place
    return Stream(
        parsed.spec,
        parsed.codec,
        n_bytes,
        coded,
        decoded,
        positions.astype(np.int64),
        values.view(f"u{values.itemsize}").astype(np.uint32),
    )


def _coded(parsed: Envelope, begin: int) -> Coded:
    """begin: of the payload, in bytes from the envelope's first."""
    payload, spec, bound, lower = parsed.payload, parsed.spec, parsed.spec.abs_bound, -1
    exact = parsed.codec == LosslessCodec.id
    if not exact and len(payload) and payload[0] == EXACT:
        payload, begin, exact = payload[1:], begin + 1, True
    if exact:
        bound = 0.0
        if spec.dtype == "F32":
            if len(payload) < 2 * spec.size:
                raise CorruptionError(
                    f"lossless: expected {2 * spec.size} bytes or more, found {len(payload)}"
                )
            lower, payload, begin = begin, payload[2 * spec.size :], begin + 2 * spec.size
    elif bound <= 0:
        raise CorruptionError("bound: a bound of 0 in a payload that is no exact copy")
    source, output = (0, 0) if exact else (DTYPE_CODES[spec.source_dtype], DTYPE_CODES[spec.dtype])
    try:
        found = _native.bound_plan(payload, spec.size, source, output, bound)
    except _native.Corrupt as error:
        raise CorruptionError(f"{parsed.codec}: {error}") from None
    except ValueError as error:
        raise CodecError(f"{parsed.codec}: {error}") from None
    n_tables = found["n_tables"]
    return Coded(
        table_log=found["table_log"],
        lanes_log=found["lanes_log"],
        low_bits=found["low_bits"],
        n_tables=n_tables,
        columns=found["columns"],
        rows_per_segment=found["rows_per_segment"],
        symbol_low=found["symbol_low"],
        class_base=found["class_base"],
        row_classes=found["row_classes"],
        column_classes=found["column_classes"],
        symbols=_symbols(found["frequencies"].reshape(n_tables, -1)),
        values=found["values"].astype(np.uint32 if spec.dtype == "F32" else np.uint16),
        segments=found["segments"].astype(np.int64) + begin,
        words=found["segment_words"].astype(np.int32),
        lower=lower,
        steps=found["steps"],
        factors=found["factors"],
        by_row=found["by_row"],
    )


def _symbols(frequencies: Numbers) -> Numbers:
    """What the device knows of each symbol of each table; one without slots is never asked for."""
    f = frequencies.astype(np.uint32)
    before = f.cumsum(axis=1, dtype=np.uint32) - f
    symbols: Numbers = np.maximum(f, 1) - np.uint32(1) | before << np.uint32(12)
    return symbols
