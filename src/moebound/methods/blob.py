"""The frame around what a method wrote: a matrix, a part that several share, a router edit.

Self-contained but for the shared parts, which a matrix names with their checksums, so that no other
part is taken for one. docs/format-method.md has every byte; this file is its reference. A change to
the bytes is a new VERSION; old versions decode for ever.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from moebound.codec.envelope import MAX_DIMS, shape_fault
from moebound.codec.fields import FieldReader, as_bytes, checksum, put_varint
from moebound.errors import CorruptionError, FormatError, MethodError
from moebound.types import DType

MAGIC = b"MOEM"
VERSION = 1
MAX_USES = 64
_MATRIX, _SHARED, _ROUTER = 0, 1, 2
_DTYPES: tuple[DType, ...] = ("BF16", "F16", "F32")
_METHOD_ID = re.compile(rb"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class Use:
    """A shared part that a matrix was encoded with. number: in its group. checksum: of its blob."""

    number: int
    checksum: int


@dataclass(frozen=True)
class MatrixBlob:
    """One matrix. method, method_version: whose payload it is. group: whose parts it uses."""

    method: str
    method_version: int
    shape: tuple[int, ...]
    dtype: DType
    group: int
    uses: tuple[Use, ...]
    payload: memoryview

    def build(self) -> bytes:
        """The bytes. This and the others' raise MethodError for what no reader would take."""
        if len(self.uses) > MAX_USES:
            raise MethodError(f"{len(self.uses)} shared parts: at most {MAX_USES}")
        if fault := shape_fault(self.shape):
            raise MethodError(fault)
        head = _head(_MATRIX, self.method, self.method_version)
        head += bytes([_DTYPES.index(self.dtype), len(self.shape)])
        for extent in self.shape:
            put_varint(head, extent)
        put_varint(head, len(self.uses))
        if self.uses:
            _put(head, "group", self.group)
        for use in self.uses:
            _put(head, "number", use.number)
            head += struct.pack("<I", use.checksum)
        return _seal(head, self.payload)


@dataclass(frozen=True)
class SharedBlob:
    """Part `number` of a group. held_bytes: memory that it takes while it is open."""

    method: str
    method_version: int
    group: int
    number: int
    held_bytes: int
    payload: memoryview

    def build(self) -> bytes:
        head = _head(_SHARED, self.method, self.method_version)
        _put(head, "group", self.group)
        _put(head, "number", self.number)
        _put(head, "held_bytes", self.held_bytes)
        return _seal(head, self.payload)


@dataclass(frozen=True)
class RouterBlob:
    """A group's router edit, as `RouterEdit.to_bytes` writes it."""

    method: str
    method_version: int
    group: int
    payload: memoryview

    def build(self) -> bytes:
        head = _head(_ROUTER, self.method, self.method_version)
        _put(head, "group", self.group)
        return _seal(head, self.payload)


def blob_checksum(data: bytes | memoryview) -> int:
    """What a blob's last four bytes say."""
    return int.from_bytes(data[-4:], "little")


def is_blob(data: bytes | bytearray | memoryview) -> bool:
    """Whether these bytes are a method's, as opposed to a codec's envelope."""
    return bytes(data[:4]) == MAGIC


def parse_matrix(data: bytes | bytearray | memoryview) -> MatrixBlob:
    """Take bytes apart and check them. The payload is a view of them.

    Raises FormatError (no or unknown format), CorruptionError (damaged).
    """
    read, method, version = _open(data, _MATRIX, "a matrix")
    dtype, n_dims = read.take(2)
    if dtype >= len(_DTYPES) or n_dims > MAX_DIMS:
        raise FormatError(f"dtype {dtype}, {n_dims} dimensions: not known to version 1")
    shape = tuple(read.varint() for _ in range(n_dims))
    if fault := shape_fault(shape):
        raise FormatError(fault)
    n_uses = read.varint()
    if n_uses > MAX_USES:
        raise FormatError(f"{n_uses} shared parts: at most {MAX_USES}")
    group = read.varint() if n_uses else 0
    uses = tuple(Use(read.varint(), int.from_bytes(read.take(4), "little")) for _ in range(n_uses))
    return MatrixBlob(method, version, shape, _DTYPES[dtype], group, uses, _payload(read))


def parse_shared(data: bytes | bytearray | memoryview) -> SharedBlob:
    """As `parse_matrix`."""
    read, method, version = _open(data, _SHARED, "a shared part")
    group, number, held_bytes = read.varint(), read.varint(), read.varint()
    return SharedBlob(method, version, group, number, held_bytes, _payload(read))


def peek_shared(head: bytes | memoryview) -> tuple[int, int]:
    """Group and number of a shared part, from its first PEEK_BYTES. Nothing else is checked.

    Raises FormatError or CorruptionError for bytes that begin no shared part.
    """
    view = as_bytes(head)
    if len(view) < 8 or not is_blob(view) or view[4] != VERSION or view[5] != _SHARED:
        raise FormatError(f"expected a shared part, found {bytes(view[:8])!r}")
    read = FieldReader(view, 7 + view[6] + 1)
    return read.varint(), read.varint()


PEEK_BYTES = 64


def parse_router(data: bytes | bytearray | memoryview) -> RouterBlob:
    """As `parse_matrix`."""
    read, method, version = _open(data, _ROUTER, "a router edit")
    group = read.varint()
    return RouterBlob(method, version, group, _payload(read))


def _head(kind: int, method: str, version: int) -> bytearray:
    name = method.encode()
    if not _METHOD_ID.fullmatch(name) or not 0 <= version <= 255:
        raise MethodError(
            f"id {method!r}, version {version}: expected 1 to 32 of a-z, 0-9 and _, and 0 to 255"
        )
    return bytearray(MAGIC) + bytes([VERSION, kind, len(name)]) + name + bytes([version])


def _put(head: bytearray, what: str, value: int) -> None:
    if isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise MethodError(f"{what} {value!r}: expected 0 or more, at most 63 bits")
    put_varint(head, value)


def _seal(head: bytearray, payload: memoryview) -> bytes:
    put_varint(head, len(payload))
    body = b"".join((head, payload))
    return body + struct.pack("<I", checksum(body))


def _open(
    data: bytes | bytearray | memoryview, kind: int, what: str
) -> tuple[FieldReader, str, int]:
    view = as_bytes(data)
    if len(view) < 5 or not is_blob(view):
        raise FormatError(f"expected bytes that begin with {MAGIC!r}, found {bytes(view[:4])!r}")
    if view[4] != VERSION:
        raise FormatError(f"method format {view[4]}: this moebound reads version {VERSION}")
    if len(view) < 9 or blob_checksum(view) != checksum(view[:-4]):
        raise CorruptionError(f"checksum does not match ({len(view)} bytes)")
    read = FieldReader(view[:-4], 5)
    found, n_method = read.take(2)
    if found != kind:
        raise FormatError(f"expected {what}, found kind {found}")
    method = bytes(read.take(n_method))
    if not _METHOD_ID.fullmatch(method):
        raise FormatError(f"method id {method!r}")
    return read, method.decode(), read.take(1)[0]


def _payload(read: FieldReader) -> memoryview:
    payload = read.take(read.varint())
    if read.left:
        raise CorruptionError(f"{read.left} bytes behind the payload")
    return payload
