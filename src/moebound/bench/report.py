"""What a run of the codec benchmark found, as rows; JSON out and in."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moebound.bench.timing import Timing

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One codec on one matrix at one rate; its output was verified before it was timed.

    codec: as it ran (``sz3:nopred``); asked: as it was asked for (``sz3`` is its best algorithm).
    n_bytes: everything that must be kept, envelope and patch included. payload_bytes: of them, the
        codec's own.
    entropy_bits_per_weight: order-0 entropy of round(x/2ε), the ideal uniform quantizer with real
        numbers as output: rounding to `dtype` costs extra and is not in it.
    size_to_sz3: n_bytes over those of SZ3's smallest algorithm on the same case; None without SZ3.
    encode: with the check of the bound and the envelope; compress: the codec alone; decode:
        with checksum and patch, into memory that is there. One thread.
    encode_threads, decode_threads: the same with `threads` threads, None if that is 1.
    """

    matrix: str
    source: str
    shape: tuple[int, int]
    dtype: str
    rate: float
    abs_bound: float
    codec: str
    asked: str
    n_bytes: int
    payload_bytes: int
    patched: int
    max_abs_error: float
    rmse: float
    entropy_bits_per_weight: float
    size_to_sz3: float | None
    encode: Timing
    compress: Timing
    decode: Timing
    threads: int
    encode_threads: Timing | None
    decode_threads: Timing | None

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights

    @property
    def over_entropy_bits(self) -> float:
        """Bits a weight above the ideal uniform quantizer; below 0 is possible with a context."""
        return self.bits_per_weight - self.entropy_bits_per_weight

    @property
    def decode_gweights_per_s(self) -> float:
        return self.n_weights / self.decode.p50_s / 1e9

    @property
    def encode_gweights_per_s(self) -> float:
        return self.n_weights / self.encode.p50_s / 1e9

    @property
    def compress_gweights_per_s(self) -> float:
        return self.n_weights / self.compress.p50_s / 1e9

    @property
    def decode_scaling(self) -> float | None:
        """How many times faster `threads` threads decode than one."""
        return self.decode.p50_s / self.decode_threads.p50_s if self.decode_threads else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "shape": list(self.shape),
            "bits_per_weight": self.bits_per_weight,
            "over_entropy_bits": self.over_entropy_bits,
            "encode_gweights_per_s": self.encode_gweights_per_s,
            "compress_gweights_per_s": self.compress_gweights_per_s,
            "decode_gweights_per_s": self.decode_gweights_per_s,
            "decode_scaling": self.decode_scaling,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        fields["shape"] = tuple(data["shape"])
        for name in ("encode", "compress", "decode", "encode_threads", "decode_threads"):
            fields[name] = Timing(**data[name]) if data[name] else None
        return cls(**fields)


@dataclass(frozen=True)
class Sz3Sizes:
    """Every SZ3 algorithm on one case, bits per weight by its name.

    bits_per_weight: everything, as in `Row`. stream_bits_per_weight: SZ3's stream alone at exactly
    ε, which is what SZ3 would take if rounding its output to the matrix's dtype were free.
    """

    matrix: str
    rate: float
    bits_per_weight: dict[str, float]
    stream_bits_per_weight: dict[str, float]


@dataclass(frozen=True)
class BenchReport:
    """One run. environment: `environment.describe()`; memcpy_gb_per_s: one thread, measured in
    this run before and after the cases."""

    rows: tuple[Row, ...]
    sz3: tuple[Sz3Sizes, ...]
    memcpy_gb_per_s: tuple[float, float]
    environment: dict[str, Any]

    def row(self, matrix: str, rate: float, asked: str) -> Row | None:
        """The row of one case and codec, if it was measured."""
        for row in self.rows:
            if (row.matrix, row.rate, row.asked) == (matrix, rate, asked):
                return row
        return None

    def sz3_stream(self, matrix: str, rate: float) -> float | None:
        """Bits per weight of SZ3's smallest stream, as if rounding its output were free."""
        for sizes in self.sz3:
            if (sizes.matrix, sizes.rate) == (matrix, rate):
                return min(sizes.stream_bits_per_weight.values())
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "environment": self.environment,
            "memcpy_gb_per_s": list(self.memcpy_gb_per_s),
            "sz3": [asdict(sizes) for sizes in self.sz3],
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BenchReport:
        """Raises ValueError for a format that is not known here."""
        if data.get("format") != FORMAT:
            raise ValueError(f"benchmark format {data.get('format')!r}: expected {FORMAT}")
        before, after = data["memcpy_gb_per_s"]
        return cls(
            tuple(Row.from_json(row) for row in data["rows"]),
            tuple(Sz3Sizes(**sizes) for sizes in data["sz3"]),
            (before, after),
            data["environment"],
        )
