"""`moebound bench codec`: size, error and speed of codecs on the same matrices, in one run.

For each matrix and rate: encode with every codec and verify (dtype, shape, and the bound after the
cast, measured by `codec.measure`); a codec that breaks its promise ends the run. Then time all of
them in turns (`timing.interleaved`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moebound.bench.environment import describe
from moebound.bench.matrices import Matrix
from moebound.bench.report import BenchReport, Row, Sz3Sizes
from moebound.bench.table import render_table
from moebound.bench.timing import interleaved, memcpy_gb_per_s
from moebound.codec import (
    ArraySpec,
    Certificate,
    Codec,
    decode_into,
    encode_certified,
    envelope,
    get_codec,
    stats,
)
from moebound.codec.strict import within_bound
from moebound.errors import BackendUnavailable, BoundError
from moebound.types import Array, DType, ErrorBound

__all__ = ["RATES", "SZ3_ALGORITHMS", "BenchReport", "Step", "entropy_bits", "render_table", "run"]

RATES = (0.02, 0.05, 0.1, 0.3, 0.8)
SZ3_ALGORITHMS = ("nopred", "lorenzo", "interp", "interp_lorenzo")


@dataclass(frozen=True)
class Step:
    """How far a run is: cases (a matrix at a rate) done of all, and the one that comes next."""

    done: int
    total: int
    label: str


@dataclass(frozen=True)
class _Entry:
    """One codec's verified output on one case."""

    asked: str
    name: str
    codec: Codec
    data: bytes
    n_payload: int
    abs_bound: float
    certificate: Certificate


def run(
    matrices: Sequence[Matrix],
    rates: Sequence[float] = RATES,
    codecs: Sequence[str] = ("bound", "sz3"),
    *,
    seconds_per_case: float = 3.0,
    threads: int = 2,
    progress: Callable[[Step], None] | None = None,
) -> BenchReport:
    """Measure every codec on every matrix at every rate.

    rates: α of ErrorBound mode "rate", scope "matrix". codecs: ids with options; plain ``sz3`` is
    the smallest of its algorithms, found per case. seconds_per_case: timing budget of one matrix
    at one rate, all codecs together. threads: what the multi-threaded timings use; 1 leaves them
    out. progress: called before each case and once at the end.

    SZ3's sizes are measured even if it is not asked for, if it is installed.

    Raises BoundError if a codec breaks its bound, or a matrix has no finite value but 0;
    CodecError or BackendUnavailable for a codec that cannot be had.
    """
    if threads < 1 or not seconds_per_case > 0:
        raise ValueError(f"threads {threads}, seconds_per_case {seconds_per_case}: too few")
    for codec in codecs:
        get_codec(codec)
    cases = [(matrix, rate) for matrix in matrices for rate in rates]
    rows: list[Row] = []
    all_sz3: list[Sz3Sizes] = []
    before = memcpy_gb_per_s()
    for done, (matrix, rate) in enumerate(cases):
        if progress:
            progress(Step(done, len(cases), f"{matrix.name} at rate {rate:g}"))
        sz3 = _sz3_entries(matrix, rate)
        entries = [_entry(matrix, rate, codec, sz3) for codec in codecs]
        rows += _time(matrix, rate, entries, sz3, seconds_per_case, threads)
        if sz3:
            all_sz3.append(_sz3_sizes(matrix, rate, sz3))
    if progress:
        progress(Step(len(cases), len(cases), "done"))
    return BenchReport(tuple(rows), tuple(all_sz3), (before, memcpy_gb_per_s()), describe())


def entropy_bits(array: Array, abs_bound: float) -> float:
    """Order-0 entropy of round(x/2ε) over the finite values, bits per value."""
    x = array.astype(np.float64).reshape(-1)
    _, counts = np.unique(np.rint(x[np.isfinite(x)] / (2 * abs_bound)), return_counts=True)
    if counts.size == 0:
        return 0.0
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum()) + 0.0


def _sz3_entries(matrix: Matrix, rate: float) -> list[_Entry]:
    try:
        found = [_verified(matrix, rate, "sz3", f"sz3:{name}") for name in SZ3_ALGORITHMS]
    except BackendUnavailable:
        return []
    return sorted(found, key=lambda entry: len(entry.data))


def _sz3_sizes(matrix: Matrix, rate: float, entries: Sequence[_Entry]) -> Sz3Sizes:
    array, totals, streams = matrix.array, {}, {}
    for entry in entries:
        name = entry.name.partition(":")[2]
        totals[name] = entry.certificate.bits_per_weight
        # For float32 output SZ3 gets exactly ε: there is no rounding to make room for.
        certificate = entry.certificate
        exact = ArraySpec(array.shape, "F32", certificate.dtype, entry.abs_bound)
        streams[name] = 8 * len(entry.codec.compress(array, exact).data) / array.size
    return Sz3Sizes(matrix.name, rate, totals, streams)


def _entry(matrix: Matrix, rate: float, asked: str, sz3: list[_Entry]) -> _Entry:
    return sz3[0] if asked == "sz3" and sz3 else _verified(matrix, rate, asked, asked)


def _verified(matrix: Matrix, rate: float, asked: str, name: str) -> _Entry:
    """Encode, decode, measure. encode_certified raises BoundError if the bound is broken."""
    codec = get_codec(name)
    bound = ErrorBound(rate, "rate")
    if bound.absolute(stats(matrix.array)) == 0.0:
        raise BoundError(f"matrix {matrix.name}: all zero, so a rate bounds nothing")
    encoded = encode_certified(matrix.array, bound, codec=codec)
    parsed = envelope.parse(encoded.data)
    found = parsed.spec
    if (found.shape, found.numpy_dtype) != (matrix.array.shape, matrix.array.dtype):
        raise BoundError(f"{name} on {matrix.name}: came back as {found.shape} {found.dtype}")
    return _Entry(
        asked, name, codec, encoded.data, len(parsed.payload), found.abs_bound, encoded.certificate
    )


def _time(
    matrix: Matrix,
    rate: float,
    entries: Sequence[_Entry],
    sz3: Sequence[_Entry],
    seconds: float,
    threads: int,
) -> list[Row]:
    jobs: dict[tuple[int, str, int], Callable[[], object]] = {}
    for i, entry in enumerate(entries):
        jobs |= {(i, *key): job for key, job in _jobs(matrix.array, entry, threads).items()}
    timings = interleaved(jobs, seconds)
    entropy = entropy_bits(matrix.array, entries[0].abs_bound) if entries else 0.0
    rows, cols = matrix.array.shape
    return [
        Row(
            matrix=matrix.name,
            source=matrix.source,
            shape=(rows, cols),
            dtype=entry.certificate.dtype,
            rate=rate,
            abs_bound=entry.abs_bound,
            codec=entry.name,
            asked=entry.asked,
            n_bytes=len(entry.data),
            payload_bytes=entry.n_payload,
            patched=entry.certificate.patched,
            max_abs_error=entry.certificate.max_abs_error,
            rmse=entry.certificate.rmse,
            entropy_bits_per_weight=entropy,
            size_to_sz3=len(entry.data) / len(sz3[0].data) if sz3 else None,
            encode=timings[i, "encode", 1],
            compress=timings[i, "compress", 1],
            decode=timings[i, "decode", 1],
            threads=threads,
            encode_threads=timings.get((i, "encode", threads)) if threads > 1 else None,
            decode_threads=timings.get((i, "decode", threads)) if threads > 1 else None,
        )
        for i, entry in enumerate(entries)
    ]


def _jobs(array: Array, entry: _Entry, threads: int) -> dict[tuple[str, int], Callable[[], object]]:
    """What is timed, by name and number of threads."""
    dtype: DType = entry.certificate.dtype
    spec = ArraySpec(array.shape, dtype, dtype, entry.abs_bound)
    out = np.empty(spec.size, spec.numpy_dtype)

    def encode(n: int) -> bytes:
        payload, values = within_bound(entry.codec, array, spec, threads=n)
        return envelope.build(
            envelope.Envelope(
                spec, entry.codec.id, entry.codec.version, memoryview(payload.data),
                payload.misses, values,
            )
        )  # fmt: skip

    def decode(n: int) -> None:
        decode_into(envelope.parse(entry.data), out, threads=n)

    if encode(1) != entry.data:
        raise BoundError(f"{entry.name}: what is timed is not what was verified")
    jobs: dict[tuple[str, int], Callable[[], object]] = {
        ("compress", 1): lambda: entry.codec.compress(array, spec)
    }
    for n in sorted({1, threads}):
        jobs["encode", n] = lambda n=n: encode(n)  # type: ignore[misc]
        jobs["decode", n] = lambda n=n: decode(n)  # type: ignore[misc]
    return jobs
