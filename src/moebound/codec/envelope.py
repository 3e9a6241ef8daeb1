"""The frame around every encoded array: what it is, its patch, a codec's payload, a checksum.

Self-contained: `parse` needs nothing but the bytes. docs/format.md, section 2, has every byte;
this file is its reference. A change to the bytes is a new VERSION; old versions decode for ever.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod

import numpy as np

from moebound.codec import patch
from moebound.codec.base import ArraySpec, Positions
from moebound.codec.fields import FieldReader, as_bytes, checksum, put_varint
from moebound.errors import CodecError, CorruptionError, FormatError
from moebound.types import NUMPY_DTYPES, Array, DType

MAGIC = b"MOEB"
VERSION = 1
MAX_DIMS = 8
MAX_SIZE = 1 << 40
_DTYPES: tuple[DType, ...] = ("BF16", "F16", "F32")
_FLAG_TORCH = 1
_CODEC_ID = re.compile(rb"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class Envelope:
    """One encoded array, taken apart.

    codec, codec_version: whose payload it is. from_torch: a torch tensor went in.
    misses, values: the patch, flat positions and verbatim values of spec.dtype.
    """

    spec: ArraySpec
    codec: str
    codec_version: int
    payload: memoryview
    misses: Positions
    values: Array
    from_torch: bool = False


def shape_fault(shape: tuple[int, ...]) -> str | None:
    """What keeps an array of this shape out of an envelope; the same for writer and reader."""
    if len(shape) > MAX_DIMS:
        return f"{len(shape)} dimensions: at most {MAX_DIMS}"
    # An extent of 0 must not hide one that no array can have.
    if prod(max(extent, 1) for extent in shape) > MAX_SIZE:
        return f"shape {shape}: out of range, at most 2^40 values (an extent of 0 counts as 1)"
    return None


def build(envelope: Envelope) -> bytes:
    """The bytes of an envelope. Raises CodecError for what `parse` would not take."""
    spec, codec = envelope.spec, envelope.codec.encode()
    if fault := shape_fault(spec.shape):
        raise CodecError(fault)
    if not _CODEC_ID.fullmatch(codec) or not 0 <= envelope.codec_version <= 255:
        raise CodecError(
            f"codec {envelope.codec!r}, version {envelope.codec_version}: expected an id of 1 to "
            "32 of a-z, 0-9 and _, and 0 to 255"
        )
    head = bytearray(MAGIC)
    flags = _FLAG_TORCH if envelope.from_torch else 0
    dtypes = _DTYPES.index(spec.dtype), _DTYPES.index(spec.source_dtype)
    head += bytes([VERSION, flags, *dtypes, len(codec)]) + codec
    head += bytes([envelope.codec_version, len(spec.shape)])
    for extent in spec.shape:
        put_varint(head, extent)
    head += struct.pack("<d", spec.abs_bound)
    put_varint(head, len(envelope.misses))
    if len(envelope.misses):
        head += patch.pack_positions(envelope.misses, spec.size)
        head += envelope.values.tobytes()
    put_varint(head, len(envelope.payload))
    body = b"".join((head, envelope.payload))
    return body + struct.pack("<I", checksum(body))


def find_payload(head: bytes) -> tuple[str, int]:
    """Codec, and offset of the payload with its length in front, of an envelope that begins with
    these bytes, which need not reach as far. Checks nothing but what this takes.

    Raises FormatError or CorruptionError.
    """
    if head[:4] != MAGIC or len(head) < 9 or head[4] != VERSION or head[6] >= len(_DTYPES):
        raise FormatError(f"expected bytes that begin with {MAGIC!r}, found {head[:4]!r}")
    read = FieldReader(memoryview(head), 8)
    codec = bytes(read.take(read.take(1)[0])).decode("ascii", "replace")
    _, n_dims = read.take(2)
    size = prod(read.varint() for _ in range(n_dims))
    read.take(8)
    count = read.varint()
    if count > size:
        raise CorruptionError(f"patch of {count} values in an array of {size}")
    at = len(head) - read.left
    if count:
        at += patch.positions_n_bytes(size, count)
        at += count * NUMPY_DTYPES[_DTYPES[head[6]]].itemsize
    return codec, at


def parse(data: bytes | bytearray | memoryview) -> Envelope:
    """Take bytes apart and check them. The payload is a view of them.

    Raises FormatError (no or unknown format), CorruptionError (damaged).
    """
    view = as_bytes(data)
    if len(view) < 5 or bytes(view[:4]) != MAGIC:
        raise FormatError(f"expected bytes that begin with {MAGIC!r}, found {bytes(view[:4])!r}")
    if view[4] != VERSION:
        raise FormatError(f"envelope version {view[4]}: this moebound reads version {VERSION}")
    if len(view) < 9 or struct.unpack("<I", view[-4:])[0] != checksum(view[:-4]):
        raise CorruptionError(f"checksum does not match ({len(view)} bytes)")
    read = FieldReader(view[:-4], 5)
    flags, dtype, source, n_codec = read.take(4)
    if flags & ~_FLAG_TORCH or dtype >= len(_DTYPES) or source >= len(_DTYPES):
        raise FormatError(f"flags {flags}, dtypes {dtype}, {source}: not known to version 1")
    codec = bytes(read.take(n_codec))
    if not _CODEC_ID.fullmatch(codec):
        raise FormatError(f"codec id {codec!r}")
    codec_version, n_dims = read.take(2)
    if n_dims > MAX_DIMS:
        raise FormatError(f"{n_dims} dimensions: at most {MAX_DIMS}")
    shape = tuple(read.varint() for _ in range(n_dims))
    if fault := shape_fault(shape):
        raise FormatError(fault)
    (abs_bound,) = struct.unpack("<d", read.take(8))
    spec = ArraySpec(shape, _DTYPES[dtype], _DTYPES[source], abs_bound)
    if not 0 <= abs_bound < float("inf"):
        raise FormatError(f"bound {abs_bound}: out of range")
    count = read.varint()
    if count > spec.size:
        raise CorruptionError(f"patch of {count} values in an array of {spec.size}")
    misses, values = np.empty(0, np.uint64), np.empty(0, NUMPY_DTYPES[spec.dtype])
    if count:
        # Positions take more room than their bytes: all bytes of the patch have to be there first.
        packed = read.take(patch.positions_n_bytes(spec.size, count))
        values = np.frombuffer(read.take(count * values.itemsize), values.dtype)
        misses = patch.unpack_positions(packed, spec.size, count)
    payload = read.take(read.varint())
    if read.left:
        raise CorruptionError(f"{read.left} bytes behind the payload")
    return Envelope(
        spec, codec.decode(), codec_version, payload, misses, values, bool(flags & _FLAG_TORCH)
    )
