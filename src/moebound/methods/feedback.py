"""Rounding that looks at the inputs: steps by input channel, errors handed on, a bound on each.

W [O, N] multiplies inputs x whose second moments are H = Σ g² x xᵀ (`files/formats/statistics.py`).
What an approximation Ŵ costs is tr((W - Ŵ) H (W - Ŵ)ᵀ), so

  steps     of column j in proportion to H_jj^(-1/2): coarse where inputs are small
  feedback  columns in turn; the error of each is made good by those behind it, through the Cholesky
            factor of H⁻¹ (GPTQ, 2210.17323, algorithm 1: Babai's nearest plane)
  a bound   feedback moves weights by many steps if it is let. Here no weight leaves
            W_ij ± κ Δ_j / 2: at κ = 2 that costs nothing measurable (docs/calibrated.md)
"""

from __future__ import annotations

import torch

BLOCK = 64
"""Columns that are rounded one by one before their errors reach all behind them at once."""
DAMPING = 0.1
"""Of the mean of H's diagonal, added to it."""


def damped(second_moments: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """[N, N] float64, positive definite. An expert that no token reached has the identity: plain
    rounding."""
    h = second_moments.double()
    mean = h.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(h), dtype=torch.float64, device=h.device)
    h = h / mean
    h.diagonal().add_(damping)
    return h


def inverse_factor(h: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, with H⁻¹ = Uᵀ U.

    H that is not positive definite in floating point is damped more, tenfold each time.
    """
    more = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                found: torch.Tensor = upper
                return found
        more = more * 10 or 0.01
        h = h + more * torch.eye(len(h), dtype=h.dtype, device=h.device)


@torch.no_grad()
def round_with_feedback(
    weights: torch.Tensor, steps: torch.Tensor, upper: torch.Tensor, kappa: float
) -> torch.Tensor:
    """Codes q, float32 [O, N] of whole numbers: Ŵ_ij = q_ij Δ_j, |W_ij - q_ij Δ_j| <= κ Δ_j / 2.

    weights: [O, N]. steps Δ: [N], above 0. upper: of `inverse_factor`, [N, N]. kappa: 1 or more;
    at 1, feedback has no room, and this is rounding to the nearest.
    """
    w = weights.float() / steps
    u = upper.float() * (steps[:, None] / steps[None, :])  # an error of j in the steps of k
    low, high = torch.ceil(w - kappa / 2), torch.floor(w + kappa / 2)
    work, codes = w.clone(), torch.empty_like(w)
    n = w.shape[1]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.empty(len(w), stop - start, dtype=w.dtype, device=w.device)
        for j in range(start, stop):
            q = work[:, j].round().clamp(low[:, j], high[:, j])
            codes[:, j] = q
            errors[:, j - start] = error = (work[:, j] - q) / u[j, j]
            work[:, j + 1 : stop] -= error[:, None] * u[j, j + 1 : stop]
        work[:, stop:] -= errors @ u[start:stop, stop:]
    return codes
