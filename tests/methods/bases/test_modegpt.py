"""MoDeGPT with what it keeps coded by another method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moebound.checkpoint import Role
from moebound.methods import ExpertView, GroupView, compress, get_method
from moebound.methods.calibrated import Calibrated
from moebound.types import Array, ErrorBound, ExpertKey

from .test_figures import made, swiglu


def correlated(p: int = 32, d: int = 40) -> tuple[GroupView, Array]:
    """An expert whose hidden values hang together, as do its inputs, and these."""
    rng = np.random.default_rng(1)
    shapes: dict[Role, tuple[int, int]] = {"gate": (p, d), "up": (p, d), "down": (d, p)}
    weights = {role: rng.standard_normal(shape) * 0.1 for role, shape in shapes.items()}
    x = rng.standard_normal((3000, d // 4)) @ rng.standard_normal((d // 4, d))
    x += 0.1 * rng.standard_normal(x.shape)
    key = ExpertKey(0, 0)
    view = ExpertView(key, {r: m.astype(np.float32) for r, m in weights.items()})
    gate = torch.nn.functional.silu(torch.from_numpy(x @ weights["gate"].T)).numpy()
    hidden = gate * (x @ weights["up"].T)
    statistics = {"inputs": {key: x.T @ x}, "hidden": {key: hidden.T @ hidden},
                  "tokens": {key: np.asarray(3000.0)}}  # fmt: skip
    return GroupView((view,), statistics), x


def test_modegpt_with_what_it_keeps_coded() -> None:
    """The same channels; every kept weight of gate and up within the bound of the whole expert;
    and rounded by inputs, which loses less than rounding to the nearest at as many bytes."""
    group, x = correlated()
    (view,) = group.experts
    key, rate = view.key, 0.5
    mean = np.mean(np.concatenate([np.abs(m).ravel() for m in view.matrices.values()]))

    def bounded(setting: str, rate: float) -> Any:
        bound = dict.fromkeys(view.matrices, ErrorBound(rate, "rate", "expert"))
        return made(setting, replace(group, experts=(replace(view, bounds=bound),)))

    alone = made("modegpt_re:k0.5", group).weights(key)
    coded = bounded("modegpt_re:k0.5+calibrated", rate)
    found = coded.weights(key)
    assert coded.guarantee == "none"  # of the channels that were cut
    assert all(m.certificate.bound is None for m in coded)
    for role in ("gate", "up"):
        kept = np.abs(alone[role]).sum(axis=1) > 0
        assert kept.sum() == 16
        assert not found[role][~kept].any()
        off = np.abs(found[role][kept] - view.matrices[role][kept]).max()
        assert mean * rate / 4 < off <= mean * rate * (1 + 1e-6)
    off = np.abs(found["down"] - alone["down"]).max()
    assert off <= mean * rate * (1 + 1e-6)

    def error(weights: Any) -> float:
        want = swiglu(x, alone)
        return float(np.linalg.norm(swiglu(x, weights) - want) / np.linalg.norm(want))

    nearest = bounded("modegpt_re:k0.5+bounded:bound", rate / 2)
    assert coded.n_bytes <= nearest.n_bytes * 1.1
    assert error(found) < 0.8 * error(nearest.weights(key))


def test_modegpt_codes_down_by_the_kept_channels() -> None:
    """Its coder gets C_JJ: with a diagonal in its place, down is rounded to the nearest."""
    group, _ = correlated()
    (view,) = group.experts
    key = view.key
    seen: dict[str, Any] = {}

    class Asks(Calibrated):
        def encode(self, group: GroupView, *, threads: int = 1) -> Any:
            seen.update({name: some[key] for name, some in group.statistics.items()})
            return super().encode(group, threads=threads)

    method = get_method("modegpt_re:k0.5+calibrated")
    object.__setattr__(method, "_coder", Asks())
    bound = dict.fromkeys(view.matrices, ErrorBound(0.5, "rate", "expert"))
    bounded = replace(group, experts=(replace(view, bounds=bound),))
    found = compress(method, bounded).weights(key)
    own = np.flatnonzero(np.abs(found["gate"]).sum(axis=1))
    whole = group.statistics["hidden"][key]
    np.testing.assert_array_equal(seen["hidden"], whole[np.ix_(own, own)])
    np.testing.assert_array_equal(seen["inputs"], group.statistics["inputs"][key])
    # Statistics of the model as it is left to the coder are what that codes by.
    moved = {"inputs": {key: np.eye(40)}, "hidden": {key: np.diag(np.arange(1.0, 33))}}
    compress(method, replace(bounded, moved=moved))
    np.testing.assert_array_equal(seen["hidden"], np.diag(own + 1.0))
    np.testing.assert_array_equal(seen["inputs"], np.eye(40))
