"""The nearest matrix of a rank, by weights or by outputs."""

from __future__ import annotations

import numpy as np
import torch

from moebound.types import Array


def spectrum(matrix: Array) -> Array:
    """[min(rows, cols)] float64: squares of the singular values, the largest first."""
    return _flip(torch.linalg.eigvalsh(_gram(matrix))).clamp(min=0).numpy()


def factors(matrix: Array, moments: Array | None = None) -> tuple[Array, Array, Array]:
    """left [rows, m], right [m, cols], energy [m]: left[:, :r] @ right[:r] is the nearest of rank
    r.

    moments: H of the inputs, [cols, cols]; nearest is then the least tr((W - Ŵ) H (W - Ŵ)ᵀ), which
    is what the SVD of W L with H = L Lᵀ, multiplied by L⁻¹, gives: U Uᵀ W, U the eigenvectors of
    W H Wᵀ. Nothing is inverted.
    """
    w = torch.from_numpy(np.ascontiguousarray(matrix, np.float64))
    if moments is not None:
        energy, u = torch.linalg.eigh(w @ torch.from_numpy(moments) @ w.T)
        left = _flip(u)
        return left.numpy(), (left.T @ w).numpy(), _flip(energy).clamp(min=0).numpy()
    energy, u = torch.linalg.eigh(_gram(matrix))
    u, energy = _flip(u), _flip(energy).clamp(min=0)
    if w.shape[0] <= w.shape[1]:
        return u.numpy(), (u.T @ w).numpy(), energy.numpy()
    return (w @ u).numpy(), np.ascontiguousarray(u.T.numpy()), energy.numpy()


def _gram(matrix: Array) -> torch.Tensor:
    w = torch.from_numpy(np.ascontiguousarray(matrix, np.float64))
    return w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w


def _flip(ascending: torch.Tensor) -> torch.Tensor:
    return ascending.flip(-1)
