"""Experts of Moonlight-16B-A3B's size, encoded for the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from moebound.bench.matrices import synthetic
from moebound.codec import encode
from moebound.codec.bound import BoundCodec
from moebound.types import Array, ErrorBound

HIDDEN, INTERMEDIATE = 2048, 1408
EXPERT_SHAPES = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
EXPERT_WEIGHTS = sum(rows * columns for rows, columns in EXPERT_SHAPES)


@dataclass(frozen=True)
class EncodedExpert:
    """Gate, up and down projection of one expert. matrices: bfloat16, as they were."""

    kind: str
    rate: float
    segment_weights: int
    matrices: tuple[Array, ...]
    data: tuple[bytes, ...]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.data))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / EXPERT_WEIGHTS


def expert(kind: str) -> tuple[Array, ...]:
    """The matrices of one expert. kind: of bench/matrices.py."""
    return tuple(
        synthetic([kind], shape=shape, seed=seed)[0].array
        for seed, shape in enumerate(EXPERT_SHAPES)
    )


def encode_expert(
    matrices: tuple[Array, ...], kind: str, rate: float, segment_weights: int
) -> EncodedExpert:
    """Encode with segments of about so many weights."""
    codec = BoundCodec(segment_weights=segment_weights)
    data = tuple(encode(m, ErrorBound(rate, "rate"), codec=codec) for m in matrices)
    return EncodedExpert(kind, rate, segment_weights, matrices, data)
