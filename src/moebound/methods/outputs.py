"""What an approximation does to a matrix's outputs, by the second moments of its inputs."""

from __future__ import annotations

import numpy as np

from moebound.types import Array


def output_error(original: Array, decoded: Array, second_moments: Array) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ), the squared error of W x summed over the text that H is of.

    original, decoded: W and Ŵ, [out, in], of any float dtype. second_moments: H = Σ g² x xᵀ of the
    inputs [in, in], or its diagonal [in]. Computed in float64. Differences of weights that are not
    finite count as 0: they are stored as they are.
    """
    with np.errstate(invalid="ignore"):
        error = original.astype(np.float64) - decoded.astype(np.float64)
    error = np.where(np.isfinite(error), error, 0.0)
    h = second_moments.astype(np.float64)
    if h.ndim == 1:
        return float(np.einsum("ij,ij,j->", error, error, h))
    return float(np.einsum("ij,ij->", error @ h, error))
