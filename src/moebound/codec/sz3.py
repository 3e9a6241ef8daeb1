"""`sz3`: the real SZ3, through its Python package pysz, each of its algorithms.

SZ3 (Liang et al., "SZ3: A Modular Framework for Composing Prediction-Based Error-Bounded Lossy
Compressors", IEEE TBD 2023) predicts, quantizes with steps of 2ε, then Huffman and zstd. It knows
float32 here: bfloat16 and float16 are widened, which is exact, and narrowed again after decoding,
which is not; `strict.py` patches what that rounding (or SZ3's own float32 check) breaks.

Options name the algorithm. On weights, which look like noise, prediction costs bits, so `nopred`
is the default. Bits per weight, payload only, 2048x1408 bf16 N(0,1), ε = rate · mean|W|,
pysz 1.1.0, 1-D / 2-D where they differ (3-D was never better than the better of the two):

    rate    entropy   nopred   lorenzo         interp          interp_lorenzo
    0.02    7.015     7.056    7.301 / 7.133   7.769 / 7.545   7.356 / 7.480
    0.1     4.697     4.721    4.930 / 4.765   5.441 / 5.232   5.038 / 5.034
    0.3     3.123     3.172    3.326 / 3.203   3.834 / 3.627   3.467 / 3.461
    0.8     1.785     1.824    1.928 / 1.851   2.456 / 2.307   2.120 / 2.117

so arrays go to SZ3 as matrices: leading axes are collapsed into one.

Where rounding to 16 bits would break the bound often, SZ3 is given a slightly smaller one, as long
as that makes stream and patch together smaller (`rounding.py`). (A [2048, 1408] bf16 matrix,
Student-t with row scales, rate 0.3: stream + patch is 3.236 + 0.215 bits per weight at ε,
3.272 + 0.001 at 0.97 ε.)

Left out: SZ3's OpenMP mode (worse ratios, and streams that depend on the thread count) and its
own ways of stating a bound. pysz holds the GIL, so threads do not help either.
"""

from __future__ import annotations

import struct
from math import prod
from typing import ClassVar, Self

import numpy as np

from moebound.codec.base import ArraySpec, Codec, Payload
from moebound.codec.envelope import MAX_SIZE
from moebound.codec.rounding import smallest_with_patch
from moebound.errors import CodecError, CorruptionError
from moebound.extras import need
from moebound.types import Array

ALGORITHMS = {
    "nopred": "NOPRED",
    "lorenzo": "LORENZO_REG",
    "interp": "INTERP",
    "interp_lorenzo": "INTERP_LORENZO",
    "lossless": "LOSSLESS",
}
"""Option -> name in pysz.szAlgorithm."""

_MAGIC = 0xF342F310
_LOSSLESS = 4
_SZ3_ERRORS = (
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What Cython makes of C++ exceptions."""

_PREDICTABLE = 2.0**100
"""Above it SZ3's predictors overflow float32; its Lorenzo then writes streams it cannot read."""


class SZ3Codec(Codec):
    """SZ3 in absolute-bound mode. Which algorithm wrote them, the bytes say themselves.

    NaN and ±Inf are shown to SZ3 as 0 and left to the patch. Bound 0 is SZ3's lossless mode.

    Hostile bytes: beyond the envelope's checksum, `decompress` checks every size that the stream
    states against the array's before SZ3 sees it. What is inside the zstd frame only SZ3 can
    read; pysz 1.1.0 raises or returns wrong numbers on mutated streams (4,800 tried, no crash),
    which is an observation and not a guarantee. Do not decode `sz3` bytes from people you do not
    trust.

    Which bytes come out depends on the pysz version; streams of older ones stay readable.
    """

    id: ClassVar[str] = "sz3"
    needs: ClassVar[tuple[str, ...]] = ("pysz",)

    def __init__(self, algorithm: str = "nopred") -> None:
        if algorithm not in ALGORITHMS:
            raise CodecError(
                f"codec sz3: option {algorithm!r} unknown, expected one of {', '.join(ALGORITHMS)}"
            )
        self.algorithm = algorithm

    @classmethod
    def from_options(cls, options: str) -> Self:
        return cls(options or "nopred")

    @classmethod
    def most_weights(cls, n_bytes: int) -> int:
        """A constant array of any size takes about a hundred bytes."""
        return MAX_SIZE

    def compress(self, x: Array, spec: ArraySpec, *, threads: int = 1) -> Payload:
        with np.errstate(invalid="ignore"):  # widening a signalling NaN
            values = x.astype(np.float32)
        values[~np.isfinite(values)] = 0.0
        largest = float(np.abs(values).max())
        algorithm = "lossless" if spec.abs_bound == 0.0 else self.algorithm
        if largest > _PREDICTABLE and algorithm != "lossless":
            algorithm = "nopred"
        # SZ3 takes NaN and 0 for "lossless" without a word; the bound here is neither. A bound
        # wider than the data promises nothing more, and overflows SZ3's noise estimate.
        bound = min(spec.abs_bound, 2.0 * largest) or 1.0
        if algorithm == "lossless":
            return Payload(_compress(values, bound, algorithm, spec))
        return Payload(
            smallest_with_patch(
                self, x, spec, bound, lambda within: _compress(values, within, algorithm, spec)
            )
        )

    def decompress(
        self, data: memoryview, spec: ArraySpec, out: Array, *, threads: int = 1
    ) -> None:
        pysz = need("pysz", "codec sz3")
        _check_sizes(data, spec.size)
        try:
            stream = np.frombuffer(data, np.uint8)
            values, _ = pysz.sz.decompress(stream, np.float32, (spec.size,))
        except _SZ3_ERRORS as error:  # MemoryError too: damaged counts ask for any amount of it
            raise CorruptionError(f"sz3: {type(error).__name__}: {error}") from error
        with np.errstate(over="ignore", invalid="ignore"):  # the patch has what overflowed
            out[:] = values

    def __repr__(self) -> str:
        return f"SZ3Codec({self.algorithm!r})"


def _compress(values: Array, bound: float, algorithm: str, spec: ArraySpec) -> bytes:
    """SZ3's stream for finite float32 values."""
    pysz = need("pysz", "codec sz3")
    config = pysz.szConfig()
    config.errorBoundMode = pysz.szErrorBoundMode.ABS
    config.absErrorBound = bound
    config.cmprAlgo = getattr(pysz.szAlgorithm, ALGORITHMS[algorithm])
    try:
        stream, _ = pysz.sz.compress(values.reshape(_matrix(spec.shape)), config)
    except MemoryError:
        raise
    except _SZ3_ERRORS as error:
        raise CodecError(f"codec sz3:{algorithm}: {error}") from error
    return stream.tobytes()  # type: ignore[no-any-return]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[..., cols] as [rows, cols]; a vector or a scalar is one row."""
    cols = shape[-1] if shape else 1
    return prod(shape[:-1]), cols


def _check_sizes(data: memoryview, size: int) -> None:
    """Compare every size in an SZ3 stream with the number of values expected.

    Layout: magic u32, version u32, payload length u64, payload, configuration. The payload begins
    with the length that its zstd frame unpacks to; the configuration is laid out below. All
    little-endian. Raises CorruptionError.
    """
    try:
        magic, _, n_payload = struct.unpack_from("<IIQ", data)
        config = data[16 + n_payload :]
        n_config, n_dims, dim_bits = struct.unpack_from("<BBB", config)
        at = 3 + (n_dims * dim_bits + 7) // 8
        packed = int.from_bytes(config[3:at], "little")
        dims = [packed >> (i * dim_bits) & ((1 << dim_bits) - 1) for i in range(n_dims)]
        num, algorithm, mode, _, flags = struct.unpack_from("<QBBdB", config, at)
        (n_unpacked,) = struct.unpack_from("<Q", data, 16)
    except (struct.error, OverflowError, ValueError) as error:
        raise CorruptionError(f"sz3: {len(data)} bytes, too few for a stream") from error
    # Quantization codes and verbatim values, 4 bytes each, and a Huffman tree of 2^17 nodes.
    unpacked_fits = n_unpacked <= 8 * size + (1 << 22)
    if algorithm == _LOSSLESS:
        unpacked_fits = n_unpacked == 4 * size
    sound = (
        magic == _MAGIC
        and n_payload >= 8
        and n_config == len(config)
        and 1 <= n_dims <= 4
        and prod(dims) == num == size
        and algorithm <= _LOSSLESS
        and mode == 0
        and not flags & 8  # the OpenMP layout has sizes of its own
        and unpacked_fits
    )
    if not sound:
        raise CorruptionError(
            f"sz3: the stream says {num} values in {dims[:4]}, algorithm {algorithm}, mode {mode}, "
            f"{n_payload} payload bytes; expected {size} values"
        )
