"""Fields of our byte formats: varints, a reader that never leaves its bytes, the checksum."""

from __future__ import annotations

from moebound import _native
from moebound.errors import CorruptionError, FormatError


def as_bytes(data: bytes | bytearray | memoryview) -> memoryview:
    """A flat view of bytes. Raises FormatError for what has no contiguous buffer."""
    try:
        view = memoryview(data)
        return view.cast("B") if view.nbytes else memoryview(b"")
    except (TypeError, ValueError, BufferError) as error:
        raise FormatError(
            f"expected contiguous bytes, found {type(data).__name__} ({error})"
        ) from error


def checksum(data: bytes | bytearray | memoryview) -> int:
    """The low 32 bits of XXH64 with seed 0."""
    return _native.xxh64(data) & 0xFFFFFFFF


def put_varint(out: bytearray, value: int) -> None:
    """LEB128: seven bits a byte, the lowest first, the high bit says that more follow."""
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


class FieldReader:
    """A cursor that never leaves its bytes."""

    def __init__(self, view: memoryview, at: int) -> None:
        self._view, self._at = view, at

    @property
    def left(self) -> int:
        return len(self._view) - self._at

    def take(self, n_bytes: int) -> memoryview:
        if n_bytes > self.left:
            raise CorruptionError(f"expected {n_bytes} more bytes, found {self.left}")
        self._at += n_bytes
        return self._view[self._at - n_bytes : self._at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise CorruptionError("a length of more than 63 bits")
