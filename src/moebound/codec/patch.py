"""A sparse exact patch: where a codec missed, and what belongs there, bit for bit.

Positions are ascending and stored by Elias and Fano's method ("Efficient storage and retrieval
by content and address of static files", 1974): the low l bits of each as they are, the rest in
unary, about 2 + log2(n/P) bits a position for P patches in n values, within half a bit of the
best possible, and without a loop over them at either end. docs/format.md, section 3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.codec.base import Positions
from moebound.errors import CorruptionError
from moebound.types import Array

Bits = npt.NDArray[np.uint8]


def low_bits(size: int, count: int) -> int:
    """l = floor(log2(size / count)), the number of bits of a position kept as they are."""
    return max(0, (size // count).bit_length() - 1)


def positions_n_bytes(size: int, count: int) -> int:
    """Bytes of `count` (at least 1) positions below `size`."""
    low = low_bits(size, count)
    return (count * low + 7) // 8 + (count + (size >> low) + 8) // 8


def pack_positions(positions: Positions, size: int) -> bytes:
    """Ascending positions below `size` (at least one) as bytes."""
    count = len(positions)
    low = low_bits(size, count)
    p = positions.astype(np.uint64)
    lows = (p[:, None] >> np.arange(low, dtype=np.uint64)) & np.uint64(1)
    highs = np.zeros(count + (size >> low) + 1, np.uint8)
    highs[(p >> np.uint64(low)).astype(np.int64) + np.arange(count)] = 1
    packed_lows = np.packbits(lows.astype(np.uint8).reshape(-1), bitorder="little")
    return packed_lows.tobytes() + np.packbits(highs, bitorder="little").tobytes()


def unpack_positions(data: memoryview, size: int, count: int) -> Positions:
    """The positions again. `data` has exactly positions_n_bytes(size, count) bytes.

    Raises CorruptionError unless they are ascending and below size.
    """
    low = low_bits(size, count)
    split = (count * low + 7) // 8
    lows = np.unpackbits(np.frombuffer(data[:split], np.uint8), bitorder="little")
    weights = np.uint64(1) << np.arange(low, dtype=np.uint64)
    low_part = (lows[: count * low].reshape(count, low).astype(np.uint64) * weights).sum(
        axis=1, dtype=np.uint64
    )
    highs = np.unpackbits(np.frombuffer(data[split:], np.uint8), bitorder="little")
    ones = np.flatnonzero(highs)
    if len(ones) != count:
        raise CorruptionError(f"patch: expected {count} positions, found {len(ones)}")
    positions: Positions = (ones - np.arange(count)).astype(np.uint64) << np.uint64(low)
    positions |= low_part
    if positions[-1] >= size or np.any(positions[1:] <= positions[:-1]):
        raise CorruptionError(f"patch: positions are not ascending below {size}")
    return positions


def apply(out: Array, positions: Positions, values: Array) -> None:
    """Put the verbatim values where they belong. out is flat."""
    out[positions.astype(np.int64)] = values
