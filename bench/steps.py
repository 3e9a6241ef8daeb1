"""Codec `bound`, version 2 (whole numbers times steps), beside version 1 at the same bytes.

    python bench/steps.py > bench/results/steps.json          one thread; JSON

Rows have, of each matrix: bits a weight of both envelopes; of version 2, what all but the segments
takes (`header_bits`: steps, classes and tables among it), the patch, and the entropy of the whole
numbers, as they are and given the class that the decoder knows of each (`entropy_bits`,
`class_entropy_bits`). `over_bits` is by how much the payload is above the last. Then GB/s of
decoded weights of both, for every instruction set that runs here, timed in turns, and their
quotient; and of `calibrated`'s own payload, version 1, which decodes in two steps.

Matrices are of Gaussian weights: rounded to equal steps, and by method `calibrated` with second
moments of inputs that are made up, of channels that hang together and differ in size.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from moebound import _native, encode
from moebound.bench.environment import describe
from moebound.bench.timing import interleaved
from moebound.codec import Steps, encode_codes, parse, steps_in
from moebound.codec.bound import BoundCodec
from moebound.codec.reference.bits import ByteReader
from moebound.codec.reference.layout import read_layout
from moebound.methods import ExpertView, GroupView, MatrixSpec, compress, get_method
from moebound.methods.calibrated import Calibrated
from moebound.methods.packing import code
from moebound.types import NUMPY_DTYPES, Array, ErrorBound, ExpertKey

KEY = ExpertKey(0, 0)
LARGE, SMALL = (1408, 2048), (64, 32)


def weights(shape: tuple[int, int], seed: int = 0) -> Array:
    """bfloat16, rows of somewhat different scale."""
    rng = np.random.default_rng(seed)
    scale = 0.02 * np.exp(0.25 * rng.standard_normal((shape[0], 1)))
    return (rng.standard_normal(shape) * scale).astype(NUMPY_DTYPES["BF16"])


def moments(n: int, seed: int = 1) -> Array:
    """Second moments of inputs of n channels."""
    rng = np.random.default_rng(seed)
    n_shared = max(1, n // 8)
    shared = rng.standard_normal((n_shared, n)) / n_shared**0.5
    sizes = np.exp(0.6 * rng.standard_normal(n))
    factors = rng.standard_normal((2 * n, n_shared)) * np.linspace(3, 0.3, n_shared)
    x = (factors @ shared + rng.standard_normal((2 * n, n))) * sizes
    found: Array = x.T @ x
    return found


def calibrated(w: Array, rate: float) -> bytes:
    h = {KEY: moments(w.shape[1])}
    view = ExpertView(KEY, {"gate": w}, {"gate": ErrorBound(rate, "rate")})
    group = GroupView((view,), {"inputs": h, "hidden": h})
    return compress(get_method("calibrated"), group).experts[KEY]["gate"].data


def equal_steps(w: Array, rate: float) -> bytes:
    bound = rate * float(np.abs(w.astype(np.float64)).mean())
    steps = Steps(np.zeros(w.shape[1], np.uint8), 1.0)
    codes = np.rint(w.astype(np.float64) / steps.sizes(bound)).astype(np.int32)
    return encode_codes(w, codes, steps, ErrorBound(bound), bound).data


CASES: list[tuple[str, tuple[int, int], Callable[[Array, float], bytes], float]] = [
    ("equal steps", LARGE, equal_steps, 0.8), ("equal steps", LARGE, equal_steps, 0.3),
    ("calibrated", LARGE, calibrated, 1.6), ("calibrated", LARGE, calibrated, 0.6),
    ("calibrated", SMALL, calibrated, 1.6), ("calibrated", SMALL, calibrated, 0.6),
]  # fmt: skip


def entropy(values: Array, classes: Array) -> float:
    """Bits a value, given its class: of the counts themselves."""
    bits = 0.0
    for c in np.unique(classes):
        _, counts = np.unique(values[classes == c], return_counts=True)
        bits += counts.sum() * np.log2(counts.sum()) - (counts * np.log2(counts)).sum()
    return float(bits / values.size)


def of_the_same_size(w: Array, n_bytes: int) -> bytes:
    """Version 1 at the bound at which it is nearest to so many bytes."""
    mean = float(np.abs(w.astype(np.float64)).mean())
    low, high = 1e-3 * mean, 4 * mean
    for _ in range(16):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if len(encode(w, middle)) > n_bytes else (low, middle)
    return encode(w, high)


def decoding(data: bytes) -> Callable[[], object]:
    """The codec alone, without checksum and patch, into memory that is there."""
    parsed = parse(data)
    out = np.empty(parsed.spec.size, parsed.spec.numpy_dtype)
    return lambda: BoundCodec().decompress(parsed.payload, parsed.spec, out, threads=1)


def blob(codes: Array, sizes: Array, kappa: float) -> bytes:
    """The same whole numbers as `calibrated` wrote them before (format-method.md, section 5)."""
    levels = np.rint(4 * np.log2(sizes / sizes.min())).astype(np.uint8)
    head = struct.pack("<BffB", 0, kappa, sizes.min(), 8)
    found: bytes = head + levels.tobytes() + b"\0" + code(codes, 0.49)
    return found


def row(
    name: str,
    shape: tuple[int, int],
    make: Callable[[Array, float], bytes],
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    w = weights(shape)
    data = make(w, rate)
    other = of_the_same_size(w, len(data))
    parsed = parse(data)
    payload = bytes(parsed.payload)
    read = ByteReader(payload)
    layout = read_layout(read, w.size)
    header = read.at
    found = steps_in(parsed)
    if found is None or layout.scaling is None:
        raise ValueError(f"{name}: expected version 2, found version {parsed.codec_version}")
    decoded = np.empty(w.size, w.dtype)
    BoundCodec().decompress(parsed.payload, parsed.spec, decoded)
    sizes, kappa = found.sizes.astype(np.float64), found.kappa
    codes = np.rint(decoded.reshape(shape).astype(np.float64) / sizes)
    tables = np.stack([layout.tables_of_row(i) for i in range(shape[0])])
    before_v2, matrix = memoryview(blob(codes, sizes, kappa)), MatrixSpec(shape, "BF16")
    jobs = {
        "v1": decoding(other),
        "v2": decoding(data),
        "blob": lambda: Calibrated.decode(before_v2, matrix, []),
    }
    speed: dict[str, dict[str, float]] = {}
    before = _native.isa()
    for isa in _native.runnable_isas():
        _native.use_isa(isa)
        timed = interleaved(jobs, seconds)
        gb = {key: 2 * w.size / found.p20_s / 1e9 for key, found in timed.items()}
        speed[isa] = {
            "v1_gb_per_s": gb["v1"], "v2_gb_per_s": gb["v2"], "blob_gb_per_s": gb["blob"],
            "v2_to_v1": gb["v2"] / gb["v1"], "v2_to_blob": gb["v2"] / gb["blob"],
        }  # fmt: skip
    _native.use_isa(before)
    given_class = entropy(codes, tables)
    bits = 8 * len(payload) / w.size
    return {
        "case": name, "shape": shape, "rate": rate, "bits_per_weight": 8 * len(data) / w.size,
        "v1_bits_per_weight": 8 * len(other) / w.size, "payload_bits": bits,
        "header_bits": 8 * header / w.size, "patched": len(parsed.misses),
        "entropy_bits": entropy(codes, np.zeros(shape)), "class_entropy_bits": given_class,
        "over_bits": bits - given_class, "tables": layout.n_tables,
        "stretched": layout.scaling.stretch is not None, "v1_tables": parse(other).payload[3],
        "decode": speed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    seconds = parser.parse_args().seconds
    rows = []
    for case in CASES:
        print(f"{case[0]} {case[1]} at rate {case[3]}", file=sys.stderr)
        rows.append(row(*case, seconds))
    json.dump({"rows": rows, "environment": describe()}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
