"""The arithmetic of quantized formats: what is stored -> weights, as each one's own library has it.

Arrays in, arrays out. Products are made in float32 and rounded once to the weights' dtype. Integers
and 8-bit floats are exact in float32, and so are their products with 16-bit scales: where a library
computes in the dtype of its scales, it gets the same numbers.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from moebound.types import Array

FP4_VALUES = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    np.float32,
)
"""E2M1, by its four bits (OCP Microscaling 1.0, section 5.3.3)."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word hold its columns, in AWQ's packing for GEMM."""


def fp4(packed: Array) -> Array:
    """[..., n] bytes -> [..., 2 n] float32; the low four bits come first."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return FP4_VALUES[pairs.reshape(*packed.shape[:-1], -1)]


def power_of_two(exponents: Array) -> Array:
    """float32 of E8M0 bytes: 2^(byte - 127), NaN for 255."""
    values: Array = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values


def by_blocks(values: Array, scales: Array, block: tuple[int, int], row: int = 0) -> Array:
    """values [rows, cols] times the scale of the block that each is in, float32.

    scales: [block rows, block cols] float32. row: which row of the matrix is the first of `values`.
    """
    rows = (row + np.arange(values.shape[0])) // block[0]
    cols = np.arange(values.shape[1]) // block[1]
    product: Array = values.astype(np.float32) * scales[rows[:, None], cols[None, :]]
    return product


def unpack_words(words: Array, bits: int, count: int) -> Array:
    """[rows, words] of 32 bits -> [rows, count] integers, one behind the other from the lowest bit
    on, over the ends of words."""
    n_bytes = (count * bits + 7) // 8
    raw = np.ascontiguousarray(words).view(np.uint8)[:, :n_bytes]
    planes = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits)).astype(np.uint8)
    found: Array = (planes.reshape(len(words), count, bits) * weights).sum(axis=2, dtype=np.int32)
    return found


def gptq(
    qweight: Array, qzeros: Array, scales: Array, groups: Array, bits: int, *, minus_one: bool
) -> Array:
    """GPTQ's packing -> W [out, in], float32.

    qweight: [in · bits / 32, out] words, down the inputs. qzeros: [groups, out · bits / 32] words.
    scales: [groups, out]. groups: [in], of each input. minus_one: whether zero points are stored
    less 1, as format "gptq" has them and "gptq_v2" has not.
    """
    inputs, out = len(groups), scales.shape[1]
    q = unpack_words(qweight.T, bits, inputs)
    zeros = unpack_words(qzeros, bits, out)
    zeros = (zeros + minus_one).T[:, groups]
    product: Array = (q - zeros).astype(np.float32) * scales.astype(np.float32).T[:, groups]
    return product


def awq(qweight: Array, qzeros: Array, scales: Array, group: int) -> Array:
    """AWQ's packing for GEMM -> W [out, in], float32. qweight: [in, out / 8] words. qzeros:
    [groups, out / 8] words. scales: [groups, out]. group: inputs that share a scale."""
    q, zeros = _awq_columns(qweight), _awq_columns(qzeros)
    groups = np.arange(len(q)) // group
    product: Array = (q - zeros[groups]).astype(np.float32) * scales.astype(np.float32)[groups]
    return product.T


def _awq_columns(words: Array) -> Array:
    shifts = 4 * np.array(AWQ_ORDER)
    unpacked: Array = (words.view(np.uint32)[:, :, None] >> shifts.astype(np.uint32)) & 15
    return unpacked.reshape(len(words), -1).astype(np.int32)


def rounded(values: Array, dtype: Any) -> Array:
    """float32 to the dtype, ties to even; too large becomes infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = values.astype(dtype)
    return cast
