"""The decoder: docs/format.md, sections 4 and 5, from bytes to bit patterns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.formats import FORMATS, Patterns
from moebound.codec.reference.grid import MAX_CELLS, make_grid
from moebound.codec.reference.layout import Layout, read_layout
from moebound.codec.reference.rans import read_segment
from moebound.codec.reference.steps import scaled_values, step_factors, step_sizes
from moebound.errors import CorruptionError
from moebound.types import DType

EXACT = 0
"""First byte of a payload of `bound` that is an exact copy."""

EXACT_LOW_BITS = 8


def decode(payload: bytes, n: int, *, source: DType, output: DType, bound: float) -> Patterns:
    """The n values of a payload of codec `bound`, as patterns of dtype output.

    source: dtype of the values that were encoded. bound: ε. Both are in the envelope, and so is
    the patch, which the caller lays over the result.

    Raises CorruptionError on bytes that no encoder makes.
    """
    if payload[:1] == bytes([EXACT]):
        return decode_lossless(payload[1:], n, dtype=output)
    bins, layout = _decode_bins(payload, n)
    furthest = max(-_first_bin(layout), _last_bin(layout))
    if furthest >= MAX_CELLS + (1 << layout.low_bits):
        raise CorruptionError(f"bin {furthest}: beyond the largest grid")
    if (scaling := layout.scaling) is not None:
        kappa = float(np.uint16(scaling.kappa).view(np.float16))
        factors = step_factors(scaling.factors)
        steps = step_sizes(scaling.levels, kappa, bound, least=float(factors.min()))
        own, other = np.divmod(np.arange(n), layout.columns)[:: 1 if scaling.by_row else -1]
        each = steps[own] if scaling.factors is None else steps[own] * factors[other]
        return scaled_values(bins, each, output)
    grid = make_grid(source, output, bound, furthest + 1)
    values = np.array(grid.values, np.int64)
    cell = np.minimum(np.abs(bins), len(values) - 1)
    signed = values[cell] | np.where(bins < 0, FORMATS[output].sign, 0)
    return signed.astype(FORMATS[output].bits_dtype)


def decode_lossless(payload: bytes, n: int, *, dtype: DType) -> Patterns:
    """The n values of a payload of codec `lossless`, as patterns. Raises CorruptionError."""
    if dtype != "F32":
        return _decode_halves(payload, n)
    read = ByteReader(payload)
    lower = np.frombuffer(read.take(2 * n), "<u2").astype(np.uint32)
    upper = _decode_halves(payload[2 * n :], n).astype(np.uint32)
    return upper << np.uint32(16) | lower


def _decode_halves(payload: bytes, n: int) -> npt.NDArray[np.uint16]:
    """Section 5: bins are patterns, rotated left by one."""
    bins, layout = _decode_bins(payload, n)
    top = layout.symbol_low + layout.n_symbols
    if (
        layout.scaling is not None
        or layout.low_bits != EXACT_LOW_BITS
        or layout.symbol_low < 0
        or top > 256
    ):
        raise CorruptionError(f"{layout.low_bits} low bits: not an exact copy")
    rotated = bins.astype(np.uint16)
    return rotated >> np.uint16(1) | rotated << np.uint16(15)


def _decode_bins(payload: bytes, n: int) -> tuple[npt.NDArray[np.int64], Layout]:
    """The bin of every weight, row-major."""
    read = ByteReader(payload)
    layout = read_layout(read, n)
    symbols, lows = [], []
    for rows, n_words in zip(layout.segments(n), layout.segment_words, strict=True):
        of_segment = read_segment(read, layout, rows, n, n_words)
        symbols += of_segment[0]
        lows += of_segment[1]
    if read.at != len(payload):
        raise CorruptionError(f"{len(payload) - read.at} bytes behind the last segment")
    top = np.array(symbols, np.int64) + layout.symbol_low
    return top << layout.low_bits | np.array(lows, np.int64), layout


def _first_bin(layout: Layout) -> int:
    return layout.symbol_low << layout.low_bits


def _last_bin(layout: Layout) -> int:
    return ((layout.symbol_low + layout.n_symbols) << layout.low_bits) - 1
