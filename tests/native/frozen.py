"""What this machine's kernel writes, in a file that `check_frozen` reads on another machine.

The stored fixtures of codec `bound`, which are decoded, and arrays drawn here, which are encoded,
decoded and judged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from codec.kernel import SEGMENT_WEIGHTS, flat, kernel_decode, kernel_encode
from codec.make_fixtures import CASES
from codec.weights import gaussian
from moebound import _native
from moebound.codec.bound import DTYPE_CODES, EXACT
from moebound.codec.envelope import parse
from moebound.codec.shape import columns_of
from moebound.types import NUMPY_DTYPES, Array, DType

SHAPES = (70, 516), (31, 1000), (256, 352)
PAIRS: tuple[tuple[DType, DType], ...] = (
    ("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F32", "BF16"),
)  # fmt: skip
RATES = 0.02, 0.1, 0.3, 0.8, 1.2
EXACTLY: tuple[DType, ...] = ("BF16", "F16")
N_ENCODED = len(SHAPES) * (len(PAIRS) * len(RATES) + len(EXACTLY))
"""How many arrays are encoded, by each path."""


def write_frozen(path: Path) -> None:
    with path.open("wb") as file:
        for record in (*_stored(), *_drawn()):
            file.write(record)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<d", value), "little")


def _stored() -> Iterator[bytes]:
    for case in CASES:
        if case.codec.partition(":")[0] != "bound":
            continue
        envelope = parse(case.load().encoded)
        payload, spec = bytes(envelope.payload), envelope.spec
        if not payload or payload[0] == EXACT:
            continue
        decoded = kernel_decode(
            payload, spec.size, spec.abs_bound, dtype=spec.dtype, source=spec.source_dtype
        ).tobytes()
        yield (
            _words(DTYPE_CODES[spec.source_dtype], DTYPE_CODES[spec.dtype], spec.size,
                   columns_of(spec.shape), _bits(spec.abs_bound), SEGMENT_WEIGHTS)
            + _words(0, len(payload), len(decoded)) + payload + decoded
        )  # fmt: skip


def _drawn() -> Iterator[bytes]:
    for seed, shape in enumerate(SHAPES):
        for source, dtype in PAIRS:
            for rate in RATES:
                weights = _spread(shape, source, seed)
                # After a cast, half a place of bfloat16 is the least that any bound can be.
                bound = 0.02 * rate + (0.001 if source != dtype else 0)
                yield _encoded(weights, bound, dtype)
        for source in EXACTLY:
            yield _encoded(_spread(shape, source, seed), 0.0, source)


def _spread(shape: tuple[int, int], dtype: DType, seed: int) -> Array:
    """Rows and columns of different scales; some values are large, some are not numbers."""
    rng = np.random.default_rng(seed)
    values = gaussian(shape, "F32", seed=seed).astype(np.float64)
    values *= np.exp(0.5 * rng.standard_normal((shape[0], 1)))
    values *= np.exp(0.5 * rng.standard_normal((1, shape[1])))
    values.flat[rng.choice(values.size, 40, replace=False)] *= 1000
    values.flat[rng.choice(values.size, 9, replace=False)] = [np.nan, np.inf, -np.inf] * 3
    return values.astype(NUMPY_DTYPES[dtype])


def _encoded(weights: Array, bound: float, dtype: DType) -> bytes:
    source, segment = _dtype(weights), 1 << 14
    payload, misses = kernel_encode(weights, bound, dtype=dtype, segment_weights=segment)
    decoded = kernel_decode(payload, weights.size, bound, dtype=dtype, source=source)
    originals, values = flat(weights).tobytes(), decoded.tobytes()
    numbers = decoded.view(np.uint16 if dtype == "BF16" else NUMPY_DTYPES[dtype])
    worst, squares, n_finite, n_broken = _native.compare(flat(weights), numbers, bound)
    n, absolute, square_sum, lowest, highest = _native.stats(flat(weights))
    return (
        _words(DTYPE_CODES[source], DTYPE_CODES[dtype], weights.size, weights.shape[-1],
               _bits(bound), segment)
        + _words(len(originals), len(payload), len(values)) + originals + payload + values
        + _words(len(misses), *misses.tolist())
        + _words(_bits(worst), _bits(squares), n_finite, n_broken)
        + _words(n, _bits(absolute), _bits(square_sum), _bits(lowest), _bits(highest))
    )  # fmt: skip


def _dtype(array: Array) -> DType:
    return next(name for name, dtype in NUMPY_DTYPES.items() if dtype == array.dtype)
