"""Stored bytes: what this version writes, kept so that every later version reads it.

    python -m tests.codec.make_fixtures

writes the fixtures that are not there yet and leaves all others alone. A fixture that no longer
decodes, or encodes to other bytes, is a broken promise, not an old file: bytes that changed on
purpose get a new format version and a new folder beside the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from moebound import decode, encode
from moebound.codec.arrays import dtype_name
from moebound.types import NUMPY_DTYPES, Array, DType

from . import weights
from .stepped import Stepped, drawn_levels, odd

FOLDER = Path(__file__).parent / "fixtures"


class Fixture(NamedTuple):
    """An array as it was, its bytes, and what they decode to."""

    original: Array
    encoded: bytes
    decoded: Array


@dataclass(frozen=True)
class Case:
    """How to make one fixture."""

    name: str
    codec: str
    array: Callable[[], Array]
    bound: float
    dtype: DType | None = None
    version: int = 1

    @property
    def path(self) -> Path:
        return FOLDER / f"v{self.version}" / f"{self.name}.npz"

    def encode(self, original: Array) -> bytes:
        return encode(original, self.bound, codec=self.codec, dtype=self.dtype)

    def make(self) -> Fixture:
        original = self.array()
        encoded = self.encode(original)
        decoded = decode(encoded)
        assert isinstance(decoded, np.ndarray)
        return Fixture(original, encoded, decoded)

    def save(self, fixture: Fixture) -> None:
        np.savez_compressed(
            self.path,
            original=fixture.original.view(f"u{fixture.original.itemsize}"),
            original_dtype=dtype_name(fixture.original.dtype),
            encoded=np.frombuffer(fixture.encoded, np.uint8),
            decoded=fixture.decoded.view(f"u{fixture.decoded.itemsize}"),
            decoded_dtype=dtype_name(fixture.decoded.dtype),
        )

    def load(self) -> Fixture:
        with np.load(self.path) as stored:
            return Fixture(
                stored["original"].view(NUMPY_DTYPES[str(stored["original_dtype"])]),  # type: ignore[index]
                stored["encoded"].tobytes(),
                stored["decoded"].view(NUMPY_DTYPES[str(stored["decoded_dtype"])]),  # type: ignore[index]
            )

    def skip_without_its_library(self) -> None:
        if self.codec.startswith("sz3"):
            pytest.importorskip("pysz")
        if self.codec.startswith("zfp"):
            pytest.importorskip("zfpy")


@dataclass(frozen=True, kw_only=True)
class SteppedCase(Case):
    """Codec `bound`, version 2, or 3 with factors: to the nearest whole number of steps."""

    codec: str = "bound"
    version: int = 2
    spread: int = 9
    by_row: bool = False
    kappa: float = 2.0
    segment_weights: int = 1 << 18
    factors: int | None = None

    def encode(self, original: Array) -> bytes:
        own, others = original.shape[:: 1 if self.by_row else -1]
        made = Stepped.of(
            original, drawn_levels(own, self.spread), self.bound, kappa=self.kappa,
            by_row=self.by_row,
            factors=None if self.factors is None else drawn_levels(others, self.factors, 1),
        )  # fmt: skip
        return made.envelope(segment_weights=self.segment_weights)


def _weights(shape: tuple[int, ...], dtype: DType, *, odd: bool = False) -> Array:
    """Gaussian weights, rows and columns of different scale; NaN, ±Inf, ±0, giants if odd."""
    rng = np.random.default_rng(20251122)
    values = rng.standard_normal(shape) * 0.02
    if len(shape) > 1:
        values *= np.exp(0.7 * rng.standard_normal(shape[:-1]))[..., None]
        values *= np.exp(0.5 * rng.standard_normal(shape[-1]))
    if odd:
        for value in (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -6e-8, 6e4):
            values[rng.random(shape) < 0.02] = value
    with np.errstate(under="ignore"):
        return values.astype(NUMPY_DTYPES[dtype])


def _coarse(shape: tuple[int, ...], dtype: DType) -> Array:
    """Many weights in few bytes: whole multiples of 2^-5."""
    whole = np.round(_weights(shape, "F32").astype(np.float64) * 32)
    return (whole / 32).astype(NUMPY_DTYPES[dtype])


def _smooth(shape: tuple[int, ...], dtype: DType) -> Array:
    """A walk far from zero."""
    steps = np.random.default_rng(20251126).standard_normal(shape) * 1e-4
    return (1 + np.cumsum(steps).reshape(shape)).astype(NUMPY_DTYPES[dtype])


CASES = [
    Case("bound_bf16", "bound", lambda: _weights((60, 64), "BF16"), 0.003),
    Case("bound_bf16_32_lanes", "bound:segment=9000", lambda: _coarse((260, 127), "BF16"), 0.02),
    Case("bound_bf16_tables", "bound", lambda: _weights((90, 100), "BF16"), 0.004),
    Case("bound_bf16_odd", "bound", lambda: _weights((2, 30, 40), "BF16", odd=True), 0.004),
    Case("bound_bf16_exact", "bound", lambda: _weights((40, 40), "BF16"), 1e-9),
    Case("bound_f16_low_bits", "bound", lambda: _weights((50, 33), "F16"), 2e-5),
    Case("bound_f16_vector", "bound", lambda: _weights((777,), "F16", odd=True), 0.001),
    Case("bound_f32", "bound", lambda: _weights((40, 50), "F32", odd=True), 1e-4),
    Case("bound_f32_to_bf16", "bound", lambda: _weights((40, 50), "F32"), 0.002, "BF16"),
    Case("bound_zeros", "bound", lambda: np.zeros((70, 70), np.float32), 0.1),
    Case("bound_scalar", "bound", lambda: np.array(0.37, np.float16), 0.01),
    Case("bound_empty", "bound", lambda: np.zeros((3, 0), np.float32), 0.01),
    Case("lossless_bf16", "lossless", lambda: _weights((40, 64), "BF16", odd=True), 1.0),
    Case("lossless_f16", "lossless", lambda: _weights((900,), "F16"), 1.0),
    Case("lossless_f32", "lossless", lambda: _weights((30, 40), "F32", odd=True), 1.0),
    Case("raw_bf16", "raw", lambda: _weights((5, 7), "BF16", odd=True), 1.0),
    Case("raw_f32", "raw", lambda: _weights((5, 7), "F32"), 1.0),
    Case("cuszp_plain_bf16", "cuszp", lambda: _weights((40, 50), "BF16"), 0.004),
    Case("cuszp_fixed_f16", "cuszp:fixed", lambda: _weights((777,), "F16", odd=True), 0.001),
    Case("cuszp_outlier_f32", "cuszp:outlier", lambda: _smooth((30, 40), "F32"), 1e-4),
    Case("cuszp_f32_to_bf16", "cuszp:fixed", lambda: _weights((40, 50), "F32"), 0.002, "BF16"),
    Case("sz3_bf16", "sz3", lambda: _weights((40, 50), "BF16", odd=True), 0.004),
    Case("zfp_f32", "zfp", lambda: _weights((40, 50), "F32", odd=True), 0.004),
    SteppedCase(name="steps_bf16", array=lambda: weights.gaussian((40, 64)), bound=0.01),
    SteppedCase(name="steps_bf16_odd", array=lambda: odd(weights.gaussian((30, 40))), bound=0.008),
    SteppedCase(
        name="steps_bf16_rows",
        array=lambda: weights.gaussian((64, 40)),
        bound=0.01,
        by_row=True,
        kappa=1.5,
    ),
    SteppedCase(
        name="steps_bf16_32_lanes",
        array=lambda: _weights((260, 127), "BF16"),
        bound=0.03,
        spread=20,
        segment_weights=9000,
    ),
    SteppedCase(
        name="steps_bf16_one_table",
        array=lambda: weights.gaussian((200, 180)),
        bound=0.02,
        spread=0,
        kappa=1.0,
    ),
    SteppedCase(
        name="steps_f16_low_bits",
        array=lambda: weights.gaussian((50, 33), "F16"),
        bound=4e-5,
        spread=4,
    ),
    SteppedCase(
        name="steps_f16_denormals",
        array=lambda: weights.gaussian((30, 33), "F16", scale=2e-5),
        bound=1e-5,
    ),
    SteppedCase(
        name="steps_f32",
        array=lambda: odd(weights.gaussian((20, 50), "F32")),
        bound=1e-3,
        spread=30,
    ),
    SteppedCase(
        name="factors_bf16",
        array=lambda: weights.gaussian((40, 64)),
        bound=0.02,
        factors=8,
        version=3,
    ),
    SteppedCase(
        name="factors_bf16_rows",
        array=lambda: odd(_weights((127, 260), "BF16")),
        bound=0.03,
        spread=20,
        factors=12,
        by_row=True,
        segment_weights=9000,
        version=3,
    ),
    SteppedCase(
        name="factors_f16",
        array=lambda: weights.gaussian((33, 40), "F16"),
        bound=0.01,
        factors=30,
        version=3,
    ),
    SteppedCase(
        name="factors_f32",
        array=lambda: odd(weights.gaussian((20, 50), "F32")),
        bound=1e-2,
        factors=16,
        kappa=1.0,
        version=3,
    ),
    SteppedCase(
        name="steps_wide", array=lambda: weights.gaussian((60, 90), "F32"), bound=0.02, spread=48
    ),
]


def own_bytes() -> list[Case]:
    """The cases whose bytes are all moebound's, not another library's."""
    return [case for case in CASES if not case.codec.startswith(("sz3", "zfp"))]


def own_codecs() -> list[Case]:
    """The cases whose payload the reference decodes."""
    return [
        case for case in CASES if case.codec.startswith(("bound", "lossless")) and case.array().size
    ]


def broken(fixture: Fixture, bound: float) -> npt.NDArray[np.intp]:
    """Positions where the stored arrays break the bound; for other dtypes, of finite values."""
    original, decoded = fixture.original, fixture.decoded
    if original.dtype == decoded.dtype:
        return weights.broken(original, decoded, bound)
    error = np.abs(original.astype(np.float64) - decoded.astype(np.float64)).reshape(-1)
    return np.flatnonzero(~(error <= bound))


def main() -> None:
    for case in CASES:
        case.path.parent.mkdir(parents=True, exist_ok=True)
        if case.path.exists():
            print(f"kept   {case.path.name}")
            continue
        case.save(case.make())
        print(f"wrote  {case.path.name}, {case.path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
