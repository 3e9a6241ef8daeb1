"""Measured error over promised error, as records have it."""

from __future__ import annotations

from moebound.codec import Certificate, stats
from moebound.types import Array


def kept_ratio(certificate: Certificate, original: Array) -> float | None:
    """Measured error over promised error: of the worst weight, or of RMSEs for an rmse bound; None
    where nothing is promised."""
    bound = certificate.bound
    if bound is None or certificate.abs_bound is None:
        return 0.0 if certificate.guarantee == "lossless" else None
    if bound.pointwise:
        found, asked = certificate.max_abs_error, certificate.abs_bound
    else:
        found, asked = certificate.rmse, bound.value * stats(original).rms
    return found / asked if asked else float(found > 0)
