"""Bytes, varints and bit strings of a header. Everything is little-endian, lowest bit first."""

from __future__ import annotations

from moebound.errors import CorruptionError

VARINT_BYTES = 5
"""Bytes of a varint at most; every number in a header fits 18 bits."""


def zigzag(value: int) -> int:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value: int) -> int:
    return -(value + 1) // 2 if value & 1 else value // 2


def put_varint(out: bytearray, value: int) -> None:
    """LEB128: seven bits a byte, the lowest first, the high bit says that more follow."""
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


class ByteReader:
    """A cursor over a payload that never leaves it. Raises CorruptionError."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.at:
            raise CorruptionError(f"payload ends early: {n_bytes} bytes wanted at {self.at}")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def byte(self, what: str, lowest: int, highest: int) -> int:
        return in_range(what, self.take(1)[0], lowest, highest)

    def varint(self, what: str, lowest: int, highest: int) -> int:
        value = 0
        for i in range(VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                return in_range(what, value, lowest, highest)
        raise CorruptionError(f"{what}: a varint of more than {VARINT_BYTES} bytes")


def in_range(what: str, value: int, lowest: int, highest: int) -> int:
    """The value, if it is in lowest .. highest. Raises CorruptionError."""
    if not lowest <= value <= highest:
        raise CorruptionError(f"{what}: expected {lowest} to {highest}, found {value}")
    return value


class BitReader:
    """Takes numbers from a bit string that begins where a byte reader is."""

    def __init__(self, read: ByteReader) -> None:
        self._read, self._begin, self._used = read, read.at, 0

    def take(self, n_bits: int) -> int:
        """The next n_bits as a number, its lowest bit first."""
        value = 0
        for i in range(n_bits):
            if self._used % 8 == 0:
                self._byte = self._read.take(1)[0]
            value |= (self._byte >> (self._used % 8) & 1) << i
            self._used += 1
        return value

    def ones(self) -> int:
        """How many ones come before the next zero, which is taken too."""
        n = 0
        while self.take(1):
            n += 1
        return n


class BitWriter:
    """Appends numbers to bytes, the lowest bit first; the last byte is padded with zeros."""

    def __init__(self, out: bytearray) -> None:
        self._out, self._used = out, 0

    def put(self, value: int, n_bits: int) -> None:
        for i in range(n_bits):
            if self._used % 8 == 0:
                self._out.append(0)
            self._out[-1] |= (value >> i & 1) << (self._used % 8)
            self._used += 1

    def put_ones(self, n: int) -> None:
        """n ones and a zero."""
        self.put((1 << n) - 1, n + 1)
