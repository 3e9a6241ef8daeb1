"""How approximations are stored, so that every machine decodes the same bits.

A product of floating-point matrices depends on the order of its sums, which a library chooses by
the machine. So factors are whole numbers, small enough that every partial sum is exact in float64:

    Ŵ_ij = u · Σ_k 2^(e_k) a_ik b_kj        |a|, |b| < 2^(b-1), e_k <= LIMIT(b, r)

is one exact integer below 2^53, in whatever order and with whatever fused instructions it is summed
up, times one float32. At 16 bits it takes the bytes of bfloat16 factors, with 7 bits more precision
next to the largest number of a component. Functions (tanh, SiLU) are computed from sums, products
and one division, each rounded by itself as IEEE 754 says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moebound.codec.fields import FieldReader, put_varint
from moebound.errors import CorruptionError, MethodError
from moebound.methods.base import SharedPayload
from moebound.methods.packing import code, pack, packed_bytes, uncode, unpack
from moebound.types import NUMPY_DTYPES, Array, DType

WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
"""Bits that a whole number may have."""
_EXACT = 53
_WIDEST = 40
_HALF = 0.49
_LARGEST = 1 << 20
_DENSE_DTYPES: tuple[DType, ...] = ("BF16", "F16", "F32")
_GAUSSIAN = math.sqrt(2 * math.pi * math.e)
"""The step of a Gaussian of variance 1 whose whole numbers have an entropy of 0 bits, for small
steps: b bits take 2^-b of it."""

Function = Literal["tanh", "silu"]


def limit(bits: int, rank: int) -> int:
    """The largest e_k for which all sums of `rank` products are exact."""
    return min(_WIDEST, _EXACT - 2 * (bits - 1) - int(rank).bit_length())


# Whole numbers with a sign


def signed_bytes(count: int, bits: int) -> int:
    return packed_bytes(count, bits)


def pack_signed(codes: Array, bits: int) -> bytes:
    """codes: whole numbers, |c| < 2^(bits-1). Up to 8 bits, 2^(bits-1) is added to each."""
    if bits == 16:
        return np.ascontiguousarray(codes).astype("<i2").tobytes()
    return pack((codes + (1 << (bits - 1))).astype(np.uint8), bits)


def take_signed(read: FieldReader, shape: tuple[int, ...], bits: int) -> Array:
    """int16 of this shape. Raises CorruptionError where bytes are missing."""
    if bits not in WIDTHS:
        raise CorruptionError(f"whole numbers of {bits} bits")
    count = math.prod(shape)
    data = read.take(signed_bytes(count, bits))
    if bits == 16:
        return np.frombuffer(data, "<i2").reshape(shape)
    return (unpack(data, count, bits).astype(np.int16) - (1 << (bits - 1))).reshape(shape)


# A sum of rank-1 matrices


def product_bytes(shape: tuple[int, ...], rank: int, bits: int) -> int:
    """What `write_product` writes for a matrix [rows, cols], but for its head of at most 8
    bytes."""
    rows, cols = shape
    return rank + signed_bytes(rank * rows, bits) + signed_bytes(rank * cols, bits)


def per_rank(shape: tuple[int, ...], bits: int) -> float:
    """Bytes of one more rank."""
    return 1 + bits * sum(shape) / 8


def write_product(left: Array, right: Array, bits: int) -> bytes:
    """left [rows, r] times right [r, cols], float64 -> rank, bits; u, e, a, b if the rank is not 0.

    Rounding moves a component by half a step of 2^(bits-1) - 1 steps on either side. How large its
    numbers are on the one side and on the other makes no difference.
    """
    rank = left.shape[1]
    out = bytearray()
    put_varint(out, rank)
    out.append(bits)
    if not rank:
        return bytes(out)
    top = (1 << (bits - 1)) - 1
    one, other = np.abs(left).max(axis=0) / top, np.abs(right).max(axis=1) / top
    dead = ~((one > 0) & (other > 0))
    one, other = np.where(dead, 1.0, one), np.where(dead, 1.0, other)
    unit, exponents = write_powers(out, np.where(dead, 0.0, one * other), limit(bits, rank))
    # The right side has its own steps, and the left side makes of them a power of two.
    one = np.float64(unit) * np.ldexp(1.0, exponents) / other
    a = np.where(dead, 0.0, np.rint(left / one)).clip(-top, top)
    b = np.where(dead[:, None], 0.0, np.rint(right / other[:, None])).clip(-top, top)
    return bytes(out) + pack_signed(a, bits) + pack_signed(b, bits)


def write_powers(out: bytearray, steps: Array, most: int) -> tuple[np.float32, Array]:
    """u and e with u · 2^e >= steps, e from 0 to most and as small as it can be; written as float32
    and a byte each."""
    largest = float(steps.max(initial=0.0))
    if not math.isfinite(largest):
        raise MethodError("a factor is not finite")
    unit = np.float32(max(largest * 2.0**-most, 2.0**-126))
    if float(unit) < largest * 2.0**-most:
        unit = np.nextafter(unit, np.float32(np.inf))
    with np.errstate(divide="ignore"):
        exponents = np.ceil(np.log2(steps / np.float64(unit)))
    found = exponents.clip(0, most).astype(np.int64)
    out += unit.astype("<f4").tobytes() + found.astype(np.uint8).tobytes()
    return unit, found


def take_product(read: FieldReader, shape: tuple[int, ...]) -> Array:
    """[rows, cols] float64, exact but for the rounding of one product. Raises CorruptionError."""
    rows, cols = _two(shape)
    rank, bits = read.varint(), read.take(1)[0]
    if not rank:
        return np.zeros((rows, cols))
    unit, exponents = take_powers(read, rank, bits)
    left = take_signed(read, (rows, rank), bits)
    right = take_signed(read, (rank, cols), bits)
    found: Array = np.ldexp(left.astype(np.float64), exponents) @ right.astype(np.float64)
    found *= unit
    return found


def take_powers(read: FieldReader, rank: int, bits: int) -> tuple[np.float64, Array]:
    """u, and [rank] e. Raises CorruptionError for sums that need not be exact."""
    unit = np.frombuffer(read.take(4), "<f4")[0]
    exponents = np.frombuffer(read.take(rank), np.uint8).astype(np.int64)
    if (
        bits not in WIDTHS
        or not math.isfinite(unit)
        or exponents.max(initial=0) > limit(bits, rank)
    ):
        raise CorruptionError(f"a sum of {rank} products of {bits} bits, unit {unit:g}")
    return np.float64(unit), exponents


# A matrix multiplied by a known one


def write_scaled(left: Array, bits: int) -> bytes:
    """left [rows, r] float64, which multiplies whole numbers of 16 bits that are stored elsewhere
    -> u, e, a."""
    out, top = bytearray(), (1 << (bits - 1)) - 1
    steps = np.abs(left).max(axis=0, initial=0.0) / top
    unit, exponents = write_powers(out, steps, limit(16, left.shape[1]))
    whole = np.rint(left / (np.float64(unit) * np.ldexp(1.0, exponents))).clip(-top, top)
    return bytes(out) + pack_signed(whole, bits)


def take_scaled(read: FieldReader, rows: int, rank: int, bits: int) -> tuple[np.float64, Array]:
    """u, and [rows, rank] float64 of whole numbers 2^(e_k) a_ik."""
    unit, exponents = take_powers(read, rank, 16)
    left = take_signed(read, (rows, rank), bits)
    return unit, np.ldexp(left.astype(np.float64), exponents)


# Whole matrices


def write_dense(matrix: Array, bits: int, dtype: DType = "BF16") -> bytes:
    """[rows, cols] float32 -> a byte of bits, then the matrix in `dtype` (16 bits: a byte says
    which) or entropy-coded whole numbers of about so many bits each."""
    if bits == 16:
        cast: bytes = matrix.astype(NUMPY_DTYPES[dtype]).tobytes()
        return bytes([16, _DENSE_DTYPES.index(dtype)]) + cast
    rms = math.sqrt(float((matrix.astype(np.float64) ** 2).sum()) / max(1, matrix.size))
    step = np.float32(rms * _GAUSSIAN / 2.0**bits)
    if not step > 0:
        step = np.float32(1)
    codes = np.rint(matrix / step)
    if not np.abs(codes).max(initial=0) <= _LARGEST:
        raise MethodError(f"weights {np.abs(codes).max() * 1.0:g} steps from 0, of {bits} bits")
    head: bytes = bytes([bits]) + step.astype("<f4").tobytes()
    return head + code(codes, _HALF)


def take_dense(read: FieldReader, shape: tuple[int, ...]) -> Array:
    """[rows, cols] float32: the rest of the bytes. Raises CorruptionError."""
    rows, cols = _two(shape)
    bits = read.take(1)[0]
    if bits == 16:
        which = read.take(1)[0]
        if which >= len(_DENSE_DTYPES):
            raise CorruptionError(f"a matrix of dtype {which}")
        dtype = NUMPY_DTYPES[_DENSE_DTYPES[which]]
        whole = read.take(rows * cols * dtype.itemsize)
        nothing_left(read)
        kept: Array = np.frombuffer(whole, dtype).reshape(rows, cols).astype(np.float32)
        return kept
    step = np.frombuffer(read.take(4), "<f4")[0]
    if not (bits in WIDTHS and math.isfinite(step) and step > 0):
        raise CorruptionError(f"a matrix of {bits} bits, step {step:g}")
    codes: Array = uncode(read.take(read.left), (rows, cols))
    codes *= step
    return codes


def dense_part(matrix: Array, bits: int, dtype: DType = "BF16") -> SharedPayload:
    """A matrix [rows, cols] that experts share: its extents, then as `write_dense`."""
    head = bytearray()
    for extent in matrix.shape:
        put_varint(head, extent)
    data = bytes(head) + write_dense(matrix.astype(np.float32), bits, dtype)
    return SharedPayload(data, held_bytes=4 * matrix.size)


def open_dense(payload: memoryview) -> Array:
    """Of `dense_part`, float32. Raises CorruptionError."""
    read = FieldReader(payload, 0)
    return take_dense(read, (read.varint(), read.varint()))


def one_dense(shared: Sequence[Any], shape: tuple[int, ...]) -> Array:
    """The one part that a payload uses. Raises CorruptionError for another shape."""
    if len(shared) != 1 or shared[0].shape != shape:
        shapes = [getattr(part, "shape", None) for part in shared]
        raise CorruptionError(f"parts of shapes {shapes}, expected one of {shape}")
    found: Array = shared[0]
    return found


def nothing_left(read: FieldReader) -> None:
    """Raises CorruptionError for bytes behind the end."""
    if read.left:
        raise CorruptionError(f"{read.left} bytes behind a matrix")


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise CorruptionError(f"shape {shape}: expected two dimensions")
    return shape[0], shape[1]


# Functions


@dataclass(frozen=True, eq=False)
class Rounded:
    """Whole numbers |c| <= 32767, float64, times a step."""

    codes: Array
    step: np.float64


def rounded(values: Array) -> Rounded:
    """To 16 bits, relative to the largest."""
    largest = np.abs(values).max(initial=0.0)
    step = np.float64(largest) / 32767.0 if largest > 0 else np.float64(1)
    return Rounded(np.rint(values / step), step)


def apply(function: Function, x: Array) -> Array:
    """tanh or SiLU of float64, the same bits on every machine."""
    if function == "tanh":
        e = _exp_of_minus(2 * np.abs(x))
        found: Array = np.copysign((1 - e) / (1 + e), x)
        return found
    e = _exp_of_minus(np.abs(x))
    share = 1 / (1 + e)
    gated: Array = x * np.where(x >= 0, share, e * share)
    return gated


_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TERMS = [1.0 / math.factorial(k) for k in range(14)]


def _exp_of_minus(y: Array) -> Array:
    """exp(-y), y >= 0: 2^-n of a Taylor series within ln 2 / 2, a rounding at each operation."""
    y = np.minimum(y, 700.0)
    n = np.rint(y * 1.4426950408889634)
    r = (n * _LN2_HIGH - y) + n * _LN2_LOW
    found = np.full_like(r, _TERMS[-1])
    for term in reversed(_TERMS[:-1]):
        found *= r
        found += term
    result: Array = np.ldexp(found, -n.astype(np.int64))
    return result
