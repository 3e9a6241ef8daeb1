"""Rounding that looks at the inputs: steps by input channel, errors handed on, a bound on each.

W [O, N] multiplies inputs x whose second moments are H = Σ g² x xᵀ (`files/formats/statistics.py`).
What an approximation Ŵ costs is tr((W - Ŵ) H (W - Ŵ)ᵀ). With H = M Mᵀ, M upper triangular, it is
the sum of squares of e = (W - Ŵ) M, and e_k = (E_k + Σ_{j<k} E_j M_jk / M_kk) M_kk for the errors
E_j of the columns: each column can still make good what those before it did. So

  feedback  columns in turn; q_k is what makes e_k smallest, given the columns before it
            (LDLQ, QuIP, 2307.13304, section 3; the same points as GPTQ, 2210.17323, algorithm 1,
            which keeps updated weights where this keeps errors: Babai's nearest plane). Errors are
            small whatever was clamped before, so float32 is enough.
  a bound   feedback moves weights by many steps if it is let. Here no weight leaves
            W_ij ± κ Δ_j / 2: at κ = 2 that costs nothing measurable (docs/log.md)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moebound.methods.shrinkage import RULE

BLOCK = 64
"""Columns that are rounded one by one before a product brings the errors of all before them."""


def damped(second_moments: torch.Tensor, damping: float = RULE.least_damping) -> torch.Tensor:
    """[N, N] float64, positive definite: H over the mean of its diagonal, and `damping` on it. H
    of no token at all is the identity: plain rounding."""
    h = second_moments.double()
    mean = h.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(h), dtype=torch.float64, device=h.device)
    h = h / mean
    h.diagonal().add_(damping)
    return h


def upper_factor(h: torch.Tensor) -> torch.Tensor:
    """M, upper triangular, with H = M Mᵀ: Cholesky from the last column to the first.

    H that is not positive definite in floating point is damped more, tenfold each time; M is that
    of the larger one.
    """
    more = 0.0
    while True:
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not failed:
            upper: torch.Tensor = lower.flip(0, 1)
            return upper
        more = more * 10 or 0.01
        h = h + more * torch.eye(len(h), dtype=h.dtype, device=h.device)


@torch.no_grad()
def round_with_feedback(
    weights: torch.Tensor, steps: torch.Tensor, upper: torch.Tensor, kappa: float
) -> torch.Tensor:
    """Codes q, float32 [O, N] of whole numbers: Ŵ_ij = q_ij Δ_j, |W_ij - q_ij Δ_j| <= κ Δ_j / 2.

    weights: [O, N]. steps Δ: [N], above 0. upper: of `upper_factor`, [N, N]. kappa: 1 or more;
    at 1, feedback has no room, and this is rounding to the nearest.
    """
    # Columns in rows, so that each is of one piece in memory; all in units of their steps.
    w = weights.float().T.contiguous().div_(steps[:, None])
    share = upper / upper.diagonal()
    share = (share * (steps[:, None] / steps[None, :])).float()  # of an error of j, in steps of k
    low, high = (w - kappa / 2).ceil_(), (w + kappa / 2).floor_()
    codes, errors = torch.empty_like(w), torch.empty_like(w)

    def nearest(k: int, wanted: torch.Tensor) -> torch.Tensor:
        return torch.clamp(wanted.round_(), low[k], high[k], out=codes[k])

    _feed(w, share, errors, 0, len(w), nearest)
    return codes.T.contiguous()


@torch.no_grad()
def quantize_with_feedback(
    weights: torch.Tensor,
    upper: torch.Tensor,
    group: int,
    top: int,
    grid: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Codes q, float32 [O, N] from 0 to top: Ŵ_ij = (q_ij - zero) step of j's group. No bound.

    weights: [O, N]. upper: of `upper_factor`, [N, N]. grid: from the weights [O, g] of a group to
    its step and zero [O]; asked when the group's turn comes, with the weights as those before have
    left them, which is where e = 0 for all of the group.
    """
    w = weights.float().T.contiguous()
    share = (upper / upper.diagonal()).float()
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for first in range(0, len(w), group):
        last = min(first + group, len(w))
        carried = share[:first, first:last].T @ errors[:first]
        own = torch.linalg.solve_triangular(
            share[first:last, first:last].T, carried, upper=False, unitriangular=True
        )
        step, zero = grid((w[first:last] + own).T.contiguous())

        def nearest(
            k: int, wanted: torch.Tensor, step: torch.Tensor = step, zero: torch.Tensor = zero
        ) -> torch.Tensor:
            codes[k] = (wanted / step).add_(zero).round_().clamp_(0, top)
            return (codes[k] - zero) * step

        _feed(w, share, errors, first, last, nearest)
    return codes.T.contiguous()


@torch.no_grad()
def round_by_turns(
    weights: torch.Tensor, upper: torch.Tensor, nearest: Callable[[int, torch.Tensor], torch.Tensor]
) -> None:
    """Columns of weights [O, N] in turn, with feedback. nearest: rounds column k to what is wanted
    of it, [O], keeps what it likes of that, and returns what it stands for. No bound."""
    w = weights.float().T.contiguous()
    share = (upper / upper.diagonal()).float()
    _feed(w, share, torch.empty_like(w), 0, len(w), nearest)


def _feed(
    w: torch.Tensor,
    share: torch.Tensor,
    errors: torch.Tensor,
    first: int,
    last: int,
    nearest: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """Columns of w (its rows) from first to last, each with what those before have left to it.
    nearest: rounds column k to what is wanted of it, and returns what it stands for."""
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        own = errors[start:stop]
        # What the columns before the block leave to each of it.
        work = torch.addmm(w[start:stop], share[:start, start:stop].T, errors[:start])
        for k in range(start, stop):
            at = k - start
            wanted = torch.addmv(work[at], own[:at].T, share[start:k, k]) if at else work[0]
            torch.sub(w[k], nearest(k, wanted), out=own[at])
