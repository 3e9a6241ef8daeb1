"""Products of a matrix of codes, and the gate of an expert, in NumPy: native/product/, to be read.

y = W x in float32, in one order: columns in groups of 32, the last filled up with zeros; lane i of
16 adds w[2i] · x[2i], then w[2i + 1] · x[2i + 1] of each group; lanes are added in halves; patches
come last, one after the other. Each step is a fused multiply-add, rounded once.

An expert with a gate rounds every product, silu(gate) and what it is multiplied to. The exponential
is native/base/exp.h, for numbers at most 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moebound.types import Array

LANES, GROUP = 16, 32

Floats = npt.NDArray[np.float32]


def fma(a: Any, b: Any, c: Any) -> Floats:
    """float32(a · b + c), rounded once.

    In float64 the product is exact; the sum is rounded to odd, which a second rounding to so much
    fewer bits does not see (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums:
    proved algorithms using rounding to odd", 2008).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        exact = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        other = np.asarray(c, np.float64)
        total = np.asarray(exact + other)
        back = total - exact
        rest = np.asarray((exact - (total - back)) + (other - back))
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        towards = np.where(rest > 0, np.inf, -np.inf)
        inexact = even & (rest != 0) & np.isfinite(rest)
        return np.where(inexact, np.nextafter(total, towards), total).astype(np.float32)


def product(
    weights: Floats, x: Floats, patched: npt.NDArray[np.uint32], patch_weights: Floats
) -> Floats:
    """[T, R] sums of weights [R, C] with x [T, C]. weights: 0 where there is a patch."""
    rows, columns = weights.shape
    padding = -columns % GROUP
    w = np.pad(weights, ((0, 0), (0, padding))).reshape(rows, -1, LANES, 2)
    a = np.pad(x, ((0, 0), (0, padding))).reshape(len(x), -1, LANES, 2)
    found = np.empty((len(x), rows), np.float32)
    for t in range(len(x)):
        lanes = np.zeros((rows, LANES), np.float32)
        for group in range(w.shape[1]):
            for odd in (0, 1):
                lanes = fma(w[:, group, :, odd], a[t, group, :, odd], lanes)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        sums = lanes[:, 0]
        for place, weight in zip(patched.tolist(), patch_weights, strict=True):
            row, column = divmod(place, columns)
            sums[row] = fma(weight, x[t, column], sums[row])
        found[t] = sums
    return found


def exp(x: Floats) -> Floats:
    """e^x of x at most 0, within 8.3e-8 times itself; 0 below -87."""
    magic = np.float32(1.5 * 2**23)
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = fma(x, np.float32(1.44269504), magic)
        whole = shifted - magic
        r = fma(whole, np.float32(2.12194440e-4), fma(whole, np.float32(-0.693359375), x))
        p = np.full_like(r, 1.98756915e-4)
        for factor in (1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5):
            p = fma(p, r, np.float32(factor))
        p = fma(p * r, r, r) + np.float32(1)
        power = (shifted.view(np.uint32) + np.uint32(127)) << np.uint32(23)
        return np.where(x < -87, np.float32(0), p * power.view(np.float32))


def silu(x: Floats) -> Floats:
    """x / (1 + e^-x), in float32."""
    with np.errstate(invalid="ignore"):
        power = exp(-np.abs(x))
        found: Floats = np.where(x >= 0, x, x * power) / (np.float32(1) + power)
        return found


def gated(gate: Array, up: Array) -> Array:
    """silu(gate) · up, of one dtype, in which both steps are rounded."""
    with np.errstate(invalid="ignore", over="ignore"):
        activated = silu(gate.astype(np.float32)).astype(gate.dtype)
        return (activated.astype(np.float32) * up.astype(np.float32)).astype(gate.dtype)
