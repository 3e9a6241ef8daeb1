"""Experts with something in common, and statistics of their inputs."""

from __future__ import annotations

import numpy as np

from moebound.checkpoint import Role
from moebound.methods import ExpertView, GroupView
from moebound.types import NUMPY_DTYPES, Array, DType, ErrorBound, ExpertKey

ROLES: tuple[Role, ...] = ("gate", "up", "down")


def shape_of(role: Role, p: int, d: int) -> tuple[int, int]:
    return (d, p) if role == "down" else (p, d)


def layer(
    n: int = 8, p: int = 24, d: int = 40, *, common: float = 1.0, seed: int = 0,
    dtype: DType = "BF16", bound: ErrorBound | None = None, statistics: bool = True,
) -> GroupView:  # fmt: skip
    """n experts of `common` times what all have and noise of variance 1, times 0.02."""
    rng = np.random.default_rng(seed)
    shared = {role: common * rng.standard_normal(shape_of(role, p, d)) for role in ROLES}
    views = tuple(
        ExpertView(
            ExpertKey(3, e),
            {
                role: (0.02 * (shared[role] + rng.standard_normal(shape_of(role, p, d)))).astype(
                    NUMPY_DTYPES[dtype]
                )
                for role in ROLES
            },
            None if bound is None else dict.fromkeys(ROLES, bound),
        )
        for e in range(n)
    )
    return GroupView(views, measured(views, p, d, rng) if statistics else {})


def measured(
    views: tuple[ExpertView, ...], p: int, d: int, rng: np.random.Generator
) -> dict[str, dict[ExpertKey, Array]]:
    keys = [view.key for view in views]
    return {
        "inputs": {key: moments(d, rng) for key in keys},
        "hidden": {key: moments(p, rng) for key in keys},
        "tokens": {key: np.asarray(40.0 + 100 * key.expert**2) for key in keys},
        "outputs": {key: np.abs(rng.standard_normal((2, d))) * (1 + key.expert) for key in keys},
    }


def moments(n: int, rng: np.random.Generator) -> Array:
    """H of inputs that hang together, of very different sizes."""
    x = rng.standard_normal((4 * n, n)) @ (
        rng.standard_normal((n, n)) * np.exp(rng.standard_normal(n))
    )
    found: Array = x.T @ x
    return found


def n_weights(group: GroupView) -> int:
    return sum(m.size for expert in group.experts for m in expert.matrices.values())
