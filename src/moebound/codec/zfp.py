"""`zfp`: the real ZFP, through its Python package zfpy, in fixed-accuracy (tolerance) mode.

ZFP (Lindstrom, "Fixed-Rate Compressed Floating-Point Arrays", IEEE TVCG 2014) transforms blocks
of 4^d values on a common exponent and keeps bit-planes down to the tolerance. It is made for
smooth fields; on weights it is here as the yardstick that it is in the literature. Its tolerance
is a power of two at or below ε, with guard bits for the transform, so that real errors are well
below ε; on denormals it does not hold (up to 2936 times over), which `strict.py` patches.

bfloat16 and float16 are widened to float32, which is exact, and narrowed after decoding.
Leading axes are collapsed: matrices are smallest. Bits per weight, 2048x1408 bf16 N(0,1),
ε = rate · mean|W|, zfpy 1.0.1, by the dimensions given to ZFP (real error as a part of ε):

    rate   entropy   1-D            2-D            3-D            4-D
    0.02   7.015     12.00 (0.59)   11.56 (0.43)   12.44 (0.27)   13.74 (0.19)
    0.3    3.123      9.00 (0.31)    8.56 (0.22)    9.44 (0.15)   10.74 (0.10)
    0.8    1.785      6.99 (0.58)    6.56 (0.33)    7.44 (0.23)    8.74 (0.15)
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import numpy as np

from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.errors import CodecError, CorruptionError
from moebound.extras import need
from moebound.types import Array

_WORD_BYTES = 8
_BLOCK_BYTES = 67
"""Of the longest block: 9 + 15 + 32 · 16 bits (`_lengths`)."""


class ZfpCodec(Codec):
    """ZFP in tolerance mode, without ZFP's header: the envelope has shape and tolerance.

    NaN and ±Inf, undefined behaviour to ZFP, are shown to it as 0 and left to the patch.

    Hostile bytes: ZFP reads its stream without looking for its end, but never more than a fixed
    number of bits a block, and one bit for a block where it finds a 0. So `decompress` lays the
    bytes into a zeroed buffer: behind their end there is room for the block that they end in, and
    for one bit of each other. A damaged stream gives wrong numbers and no error; what tells is the
    envelope's checksum.
    """

    id: ClassVar[str] = "zfp"
    needs: ClassVar[tuple[str, ...]] = ("zfpy",)

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """A bit at least for each block of 16."""
        return 8 * n_bytes * 16

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        if spec.abs_bound == 0.0:
            raise CodecError("codec zfp: bound 0 asks for an exact copy; use lossless")
        with np.errstate(invalid="ignore"):  # widening a signalling NaN
            values = x.astype(np.float32)
        values[~np.isfinite(values)] = 0.0
        stream = need("zfpy", "codec zfp").compress_numpy(
            values.reshape(_blocks_shape(spec.shape)),
            tolerance=spec.abs_bound,
            write_header=False,
        )
        return Payload(stream)

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        zfpy = need("zfpy", "codec zfp")
        shape = _blocks_shape(spec.shape)
        shortest, longest = _lengths(shape)
        if not shortest <= len(data) <= longest or spec.abs_bound == 0.0:
            raise CorruptionError(
                f"zfp: expected {shortest} to {longest} bytes and a bound above 0, "
                f"found {len(data)} and {spec.abs_bound:g}"
            )
        behind = _BLOCK_BYTES + shortest + 2 * _WORD_BYTES
        padded = np.zeros(-(-(len(data) + behind) // _WORD_BYTES) * _WORD_BYTES, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        try:
            values = zfpy._decompress(padded, zfpy.type_float, shape, tolerance=spec.abs_bound)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptionError(f"zfp: {error}") from error
        with np.errstate(over="ignore", invalid="ignore"):  # the patch has what overflowed
            out[:] = values.reshape(-1)


def _blocks_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., cols] as [rows, cols]; as a vector where a side is shorter than a block's."""
    rows, cols = prod(shape[:-1]), shape[-1] if shape else 1
    return (rows, cols) if min(rows, cols) >= 4 else (rows * cols,)


def _lengths(shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that ZFP writes at least, and can read at most, for float32 of this shape.

    Per block of 4^d values: a flag, and if it is 1 an exponent (together 9 bits), 32 planes of a
    bit a value, and one test for each value but the first (`zfp_stream_maximum_size`); then whole
    words.
    """
    n_blocks = prod(-(-extent // 4) for extent in shape)
    values = 1 << 2 * len(shape)
    bits = n_blocks * (9 + values - 1 + 32 * values)
    return -(-n_blocks // 8), (bits // 64 + 2) * _WORD_BYTES
