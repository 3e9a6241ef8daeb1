"""Student's t distribution: what the spread between a few noise seeds allows to say."""

from __future__ import annotations

import math

import numpy as np

_STEPS = 4001


def two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) for T of Student's t distribution with df > 0 degrees of freedom.

    By T = sqrt(df) tan(a) the density becomes cos(a)^(df-1), which is integrated by the trapezoid
    rule: within 1e-6 of the true value.
    """
    if df <= 0 or math.isnan(t):
        raise ValueError(f"expected degrees of freedom above 0 and a number, found {df}, {t}")
    if math.isinf(t):
        return 0.0
    low = math.atan(abs(t) / math.sqrt(df))
    at = np.linspace(low, math.pi / 2, _STEPS)
    # At a right angle the cosine is 0 up to rounding; with df < 1 it would be raised to below 0.
    density = np.maximum(np.cos(at), 1e-300) ** (df - 1)
    area = float(np.sum((density[1:] + density[:-1]) * np.diff(at)) / 2)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return min(1.0, 2 * scale * area)


def quantile(df: float, level: float = 0.95) -> float:
    """The t that |T| stays below with this probability: 12.7 for 1 degree of freedom, 1.96 for
    many."""
    low, high = 0.0, 1.0
    while two_sided(high, df) > 1 - level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > 1 - level else (low, middle)
    return (low + high) / 2
