"""Sizes for a plan: how exact, and how much cheaper than encoding at every rate.

    python bench/sizes.py            one thread; a table in Markdown

Synthetic weights whose rows and columns differ in scale, as trained ones do. Encoding at all of a
plan's rates is timed against `estimate_bytes`, in turns, the faster of two each.
"""

from __future__ import annotations

import os

os.environ.setdefault("MOEBOUND_THREADS", "1")

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from moebound.codec import encode, estimate_bytes
from moebound.plan import RATES
from moebound.types import NUMPY_DTYPES, Array, DType

T = TypeVar("T")

CASES: list[tuple[tuple[int, int], DType]] = [
    ((32, 64), "BF16"), ((512, 512), "BF16"), ((1024, 1024), "BF16"), ((2048, 1408), "BF16"),
    ((2048, 1408), "F32"), ((4096, 7168), "BF16"),
]  # fmt: skip


def weights(shape: tuple[int, int], dtype: DType, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    scale = 0.02 * np.exp(0.3 * rng.standard_normal((shape[0], 1)))
    scale = scale * np.exp(0.2 * rng.standard_normal((1, shape[1])))
    return (rng.standard_normal(shape) * scale).astype(NUMPY_DTYPES[dtype])


def timed(work: Callable[[], T]) -> tuple[T, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def main() -> None:
    print(f"| matrix | encode at {len(RATES)} rates | estimate | worst off | off on average |")
    print("|---|---|---|---|---|")
    for shape, dtype in CASES:
        x = weights(shape, dtype)
        bounds = (RATES * np.abs(x.astype(np.float64)).mean()).tolist()
        best = [float("inf")] * 2
        for _ in range(2):
            written, taken = timed(lambda: np.array([len(encode(x, b)) for b in bounds]))  # noqa: B023
            best[0] = min(best[0], taken)
            found, taken = timed(lambda: estimate_bytes(x, bounds))  # noqa: B023
            best[1] = min(best[1], taken)
        off = found / written - 1
        print(
            f"| {shape[0]} x {shape[1]} {dtype} | {1e3 * best[0]:.1f} ms | {1e3 * best[1]:.1f} ms "
            f"| {100 * np.abs(off).max():.2f} % | {100 * off.mean():+.3f} % |"
        )


if __name__ == "__main__":
    main()
