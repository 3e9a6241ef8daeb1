"""Codec `cuszp` in NumPy: docs/format-cuszp.md, section by section, to be read.

All blocks of 32 at once: axes are [blocks, 32] for values, [blocks] for rates and sizes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.errors import CorruptionError
from moebound.types import Array

MODES = ("fixed", "plain", "outlier")
BLOCK = 32
CHUNK_BLOCKS = 1024
"""The rate table is padded to whole chunks of blocks."""

SATURATED = np.float32(2**30 - 64)
"""The largest float32 below 2^30. Bins end there, so that differences fit 31 bits."""

Ints = npt.NDArray[np.int64]


def encode_stream(x: Array, abs_bound: float, mode: str) -> bytes:
    """x: float32, flat. abs_bound: ε, a float32 in 2^-126 .. 2^125."""
    differences = _differences(_in_blocks(_quantize(x, np.float32(abs_bound))), mode)
    # Padding is no value of the array: its difference is 0, whatever came before it.
    differences.reshape(-1)[x.size :] = 0
    magnitudes = np.abs(differences)
    rates = _bit_length(magnitudes.max(axis=1, initial=0))
    outliers = np.zeros_like(rates)
    if mode == "outlier":
        rates, outliers = _rates_with_outliers(magnitudes, rates)
    codes = np.where(outliers > 0, 0x80 | (outliers - 1) << 5 | rates, rates)
    blocks = zip(differences, rates, outliers, strict=True)
    return codes.astype(np.uint8).tobytes() + b"".join(_block_bytes(*block) for block in blocks)


def decode_stream(data: bytes, n: int, abs_bound: float, mode: str) -> Array:
    """The n values, float32. Raises CorruptionError on bytes that no encoder makes."""
    n_blocks = -(-n // BLOCK)
    n_table = -(-n_blocks // CHUNK_BLOCKS) * CHUNK_BLOCKS
    if len(data) < n_table:
        raise CorruptionError(f"{len(data)} bytes: expected at least {n_table}, one a block")
    codes = np.frombuffer(data[:n_table], np.uint8).astype(np.int64)
    rates, outliers = _split_codes(codes, mode)
    if codes[n_blocks:].any():
        raise CorruptionError("a rate other than 0 behind the last block")
    ends = n_table + np.cumsum(_sizes(rates, outliers))
    if n_table and ends[-1] != len(data):
        raise CorruptionError(f"{len(data)} bytes: the rates say {ends[-1]}")
    differences = np.zeros((n_blocks, BLOCK), np.int64)
    begin = n_table
    for i in range(n_blocks):
        differences[i] = _block_differences(data[begin : ends[i]], rates[i], outliers[i])
        begin = int(ends[i])
    bins = differences if mode == "fixed" else np.cumsum(differences, axis=1)
    # Sums of an encoder's differences fit; those of other bytes wrap.
    wrapped = bins.astype(np.uint64).astype(np.uint32).view(np.int32)
    with np.errstate(over="ignore"):
        return wrapped.astype(np.float32).reshape(-1)[:n] * np.float32(abs_bound) * np.float32(2)


def _quantize(x: Array, bound: np.float32) -> Ints:
    """Section 2. Multiplied, not divided, in float32: the same bins as the published encoder."""
    with np.errstate(over="ignore", under="ignore"):
        finite = np.where(np.isfinite(x), x, np.float32(0)).astype(np.float32)
        y = finite * (np.float32(0.5) / bound)
        shifted = np.clip(y + np.float32(0.5), -SATURATED, SATURATED)
    bins: Ints = np.trunc(shifted).astype(np.int64) - (y < np.float32(-0.5))
    return bins


def _in_blocks(bins: Ints) -> Ints:
    """[chunks * CHUNK_BLOCKS, BLOCK], padded with zeros."""
    n_padded = -(-bins.size // (BLOCK * CHUNK_BLOCKS)) * BLOCK * CHUNK_BLOCKS
    return np.pad(bins.reshape(-1), (0, n_padded - bins.size)).reshape(-1, BLOCK)


def _differences(bins: Ints, mode: str) -> Ints:
    """Section 3: to the bin before in the same block, where the mode has it so."""
    return bins if mode == "fixed" else np.diff(bins, axis=1, prepend=0)


def _rates_with_outliers(magnitudes: Ints, rates: Ints) -> tuple[Ints, Ints]:
    """Section 5: rates, and bytes of the outlier; 0 where a plain block is not larger."""
    others = _bit_length(magnitudes[:, 1:].max(axis=1, initial=0))
    n_outlier = -(-_bit_length(magnitudes[:, 0]) // 8)
    smaller = 4 + 4 * others + n_outlier < _sizes(rates, np.zeros_like(rates))
    return np.where(smaller, others, rates), np.where(smaller, n_outlier, 0)


def _sizes(rates: Ints, outliers: Ints) -> Ints:
    """Bytes of each block's payload."""
    return np.where((rates > 0) | (outliers > 0), 4 + 4 * rates + outliers, 0)


def _block_bytes(differences: Ints, rate: int, n_outlier: int) -> bytes:
    """Sections 4 and 5: the outlier, the signs, the planes."""
    if rate == 0 and n_outlier == 0:
        return b""
    magnitudes = np.abs(differences)
    outlier = int(magnitudes[0]).to_bytes(4, "little")[:n_outlier]
    if n_outlier:
        magnitudes[0] = 0
    planes = (magnitudes >> p & 1 for p in range(rate))
    return outlier + b"".join(_word(bits) for bits in (differences < 0, *planes))


def _block_differences(payload: bytes, rate: int, n_outlier: int) -> Ints:
    """[BLOCK] what _block_bytes wrote."""
    magnitudes = np.zeros(BLOCK, np.int64)
    if not payload:
        return magnitudes
    words = [_bits(payload[at : at + 4]) for at in range(n_outlier, len(payload), 4)]
    for p in range(rate):
        magnitudes |= words[1 + p] << p
    if n_outlier:
        magnitudes[0] = int.from_bytes(payload[:n_outlier], "little")
    return np.where(words[0] == 1, -magnitudes, magnitudes)


def _split_codes(codes: Ints, mode: str) -> tuple[Ints, Ints]:
    """Rates and bytes of the outlier, from the bytes of the table. Raises CorruptionError."""
    flagged = codes >= 0x80
    wrong = codes[(codes >= 32) & ~flagged if mode == "outlier" else codes >= 32]
    if len(wrong):
        raise CorruptionError(f"rate {wrong[0]:#04x}: no block of mode {mode} has it")
    return codes & 31, np.where(flagged, (codes >> 5 & 3) + 1, 0)


def _bit_length(magnitudes: Ints) -> Ints:
    return np.frexp(magnitudes.astype(np.float64))[1].astype(np.int64)


def _word(bits: npt.NDArray[np.generic]) -> bytes:
    """32 bits as 4 bytes: the first value has the highest bit of the first byte."""
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _bits(word: bytes) -> Ints:
    return np.unpackbits(np.frombuffer(word, np.uint8)).astype(np.int64)
