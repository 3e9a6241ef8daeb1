"""Matrices as whole numbers of steps: versions 2 and 3 of codec `bound`, made for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moebound import _native
from moebound.codec import Steps, encode_codes
from moebound.codec.arrays import dtype_name
from moebound.codec.bound import DTYPE_CODES
from moebound.types import Array, ErrorBound

from .kernel import SEGMENT_WEIGHTS, flat


@dataclass(frozen=True, eq=False)
class Stepped:
    """weights: [rows, cols]. codes: nearest whole numbers of steps. sizes: of the steps, [1, cols]
    or [rows, 1], or [rows, cols] if they have factors. bound: ε."""

    weights: Array
    codes: npt.NDArray[np.int32]
    steps: Steps
    sizes: npt.NDArray[np.float32]
    bound: float

    @classmethod
    def of(cls, weights: Array, levels: npt.ArrayLike, bound: float, *, kappa: float = 2.0,
           by_row: bool = False, factors: npt.ArrayLike | None = None) -> Stepped:  # fmt: skip
        others = None if factors is None else np.array(factors, np.uint8)
        steps = Steps(np.array(levels, np.uint8), kappa, by_row, others)
        sizes = steps.of_weights(bound)
        with np.errstate(invalid="ignore", over="ignore"):
            exact = np.rint(weights.astype(np.float64) / sizes.astype(np.float64))
        codes = np.nan_to_num(exact, posinf=0, neginf=0).clip(-(2**30), 2**30).astype(np.int32)
        return cls(weights, codes, steps, sizes, bound)

    @property
    def bounds(self) -> npt.NDArray[np.float64]:
        """Of each weight."""
        own = self.sizes.astype(np.float64) * self.steps.kappa / 2
        return np.broadcast_to(own, self.weights.shape)

    def products(self) -> Array:
        """What codes decode to, by NumPy alone."""
        with np.errstate(over="ignore"):
            return (self.codes.astype(np.float32) * self.sizes).astype(self.weights.dtype)

    def envelope(self, *, segment_weights: int = SEGMENT_WEIGHTS) -> bytes:
        return encode_codes(
            self.weights, self.codes, self.steps, ErrorBound(self.bound), self.bound,
            segment_weights=segment_weights,
        ).data  # fmt: skip

    def payload(
        self, *, segment_weights: int = SEGMENT_WEIGHTS, threads: int = 1
    ) -> tuple[bytes, npt.NDArray[np.uint64]]:
        """And the misses: the kernel's own, below the envelope and the fallback."""
        return _native.bound_encode_scaled(  # type: ignore[no-any-return]
            flat(self.weights), self.codes.reshape(-1), self.steps.levels,
            self.steps.factors_or_none, half(self.steps.kappa),
            self.steps.by_row, DTYPE_CODES[dtype_name(self.weights.dtype)], self.bound,
            self.weights.shape[1], segment_weights, threads,
        )  # fmt: skip


def half(value: float) -> int:
    """float16's bits."""
    return int(np.float16(value).view(np.uint16))


def drawn_levels(n: int, spread: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Of n steps, from the widest to `spread` below it."""
    found = np.random.default_rng(seed).integers(0, spread + 1, n)
    levels: npt.NDArray[np.uint8] = (found - found.min()).astype(np.uint8)
    return levels


def odd(weights: Array) -> Array:
    """With what is no weight, or far from all others."""
    found: Any = weights.copy()
    values = [np.nan, np.inf, -np.inf, 0.0, -0.0, 30.0, -6e4]
    at = np.random.default_rng(1).choice(found.size, min(found.size, len(values)), replace=False)
    found.reshape(-1)[at] = np.array(values[: len(at)]).astype(found.dtype)
    return np.asarray(found)
