"""A sparse exact patch: where a codec missed, and what belongs there, bit for bit.

Positions are ascending and stored by Elias and Fano's method ("Efficient storage and retrieval
by content and address of static files", 1974): the low l bits of each as they are, the rest in
unary, about 2 + log2(n/P) bits a position for P patches in n values, within half a bit of the
best possible, and without a loop over them at either end. docs/format.md, section 3.

Bits are spread over bytes a piece at a time: an array of NaN has as many positions as values, and
hostile bytes may claim as many as they like.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moebound.codec.base import Positions
from moebound.errors import CodecError, CorruptionError
from moebound.types import Array

Bits = npt.NDArray[np.uint8]

_PIECE = 1 << 13
"""Positions, or bytes of the unary part, at a time; a multiple of 8."""


def low_bits(size: int, count: int) -> int:
    """l = floor(log2(size / count)), the number of bits of a position kept as they are."""
    return max(0, (size // count).bit_length() - 1)


def positions_n_bytes(size: int, count: int) -> int:
    """Bytes of `count` (at least 1) positions below `size`."""
    low = low_bits(size, count)
    return (count * low + 7) // 8 + (count + (size >> low) + 8) // 8


def pack_positions(positions: Positions, size: int) -> bytes:
    """Ascending positions below `size` (at least one) as bytes.

    Raises CodecError for others, which no reader would take.
    """
    p, count = positions.astype(np.uint64, copy=False), len(positions)
    if p[-1] >= size or np.any(p[1:] <= p[:-1]):
        raise CodecError(f"patch: expected ascending positions below {size}")
    low = low_bits(size, count)
    lows, highs = bytearray(), np.zeros(count + (size >> low) + 1, np.uint8)
    for at in _pieces(count):
        part = p[at]
        spread = np.empty((len(part), low), np.uint8)
        for bit in range(low):
            spread[:, bit] = part >> np.uint64(bit) & np.uint64(1)
        lows += np.packbits(spread.reshape(-1), bitorder="little").tobytes()
        highs[(part >> np.uint64(low)).astype(np.int64) + np.arange(at.start, at.stop)] = 1
    return bytes(lows) + np.packbits(highs, bitorder="little").tobytes()


def unpack_positions(data: memoryview, size: int, count: int) -> Positions:
    """The positions again. `data` has exactly positions_n_bytes(size, count) bytes.

    Raises CorruptionError unless they are ascending and below size.
    """
    low = low_bits(size, count)
    split = (count * low + 7) // 8
    lows, highs = np.split(np.frombuffer(data, np.uint8), [split])
    positions: Positions = np.empty(count, np.uint64)
    weights = np.uint64(1) << np.arange(low, dtype=np.uint64)
    n_found = 0
    for at in _pieces(len(highs)):
        ones = np.flatnonzero(np.unpackbits(highs[at], bitorder="little")) + 8 * at.start
        part = positions[n_found : n_found + len(ones)]
        begin, n_found = n_found, n_found + len(ones)
        if n_found <= count:
            part[:] = ones - np.arange(begin, n_found)
            part <<= np.uint64(low)
    if n_found != count:
        raise CorruptionError(f"patch: expected {count} positions, found {n_found}")
    for at in _pieces(count):
        n_here = at.stop - at.start
        bits = np.unpackbits(
            lows[at.start * low // 8 :][: (n_here * low + 7) // 8], bitorder="little"
        )
        positions[at] |= bits[: n_here * low].reshape(n_here, low) @ weights
    if positions[-1] >= size or np.any(positions[1:] <= positions[:-1]):
        raise CorruptionError(f"patch: positions are not ascending below {size}")
    return positions


def apply(out: Array, positions: Positions, values: Array) -> None:
    """Put the verbatim values where they belong. out is flat."""
    out[positions.view(np.int64)] = values


def _pieces(count: int) -> Iterator[slice]:
    return (slice(at, min(at + _PIECE, count)) for at in range(0, count, _PIECE))
