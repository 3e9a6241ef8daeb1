"""Predictions agree with measurements where theory says they must, and rank experts right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moebound.errors import UnsupportedArchitectureError
from moebound.model import live_experts
from moebound.sensitivity.map.build import Build, Named
from moebound.sensitivity.map.margins import Choices
from moebound.sensitivity.map.observe import forward, frozen
from moebound.sensitivity.map.predict import Response
from moebound.sensitivity.map.ranks import rank_correlation
from moebound.sensitivity.map.settings import MapSettings

from .texts import random_text, sure_model


@pytest.mark.parametrize(("name", "batched"), [("deepseek_v3", True), ("mixtral", False),
                                               ("gpt_oss", False)])  # fmt: skip
def test_ranks_experts(name: str, batched: bool, tmp_path: Path) -> None:
    settings = MapSettings((0.2, 0.5), measure="all", n_probes=24, n_ties=12)
    model = sure_model(name, batched=batched)
    found = Build(model, random_text(16), Named(name, "random"), settings, tmp_path / "m").run()
    predicted = np.array([line.predicted_kl for line in found.experts])
    measured = np.array([line.measured_kl for line in found.experts])
    assert found.checks["rank_correlation"] > 0.7
    np.testing.assert_allclose(predicted.sum(0) / measured.sum(0), 1, atol=0.5)
    np.testing.assert_allclose(found.joint["measured_over_predicted"], 1, atol=0.5)


def test_probes_have_the_fisher_information_for_their_mean() -> None:
    """E[(g · dy)²] is dsᵀ (diag(p) - p pᵀ) ds, summed over positions, for a change dy of the last
    layer's output, where ds = J dy can be had by differences."""
    model, text = sure_model("mixtral"), random_text(1)
    entry = live_experts(model).stacks[-1]
    with frozen(model):
        now = forward(model, text, [entry], slice(0, 1), check=True)
        dy = 1e-3 * torch.randn(now.leaves[0].shape, generator=torch.Generator().manual_seed(1))
        probes = now.fisher_probes(400, torch.Generator().manual_seed(0), [0])[0]
        found = float((probes * dy).sum((1, 2)).square().mean())
    handle = entry.module.register_forward_hook(lambda _m, _a, output: output + dy)
    with torch.no_grad():
        moved = model(**text.inputs(slice(0, 1), model.device)).logits[now.scored].double()
    handle.remove()
    p = now.logits.detach()[now.scored].double().softmax(-1)
    ds = moved - now.logits.detach()[now.scored].double()
    want = float(((p * ds * ds).sum(-1) - (p * ds).sum(-1) ** 2).sum())
    assert found == pytest.approx(want, rel=0.25)


def test_margins_are_those_of_the_choice() -> None:
    scores = torch.rand(5, 8, requires_grad=True)
    with Choices() as choices:
        chosen = torch.topk(scores, 3, dim=-1, sorted=False).indices
        margin = choices.take(5, 8)
        assert choices.take(5, 8) is None
    assert margin is not None
    ordered = scores.sort(-1, descending=True)
    torch.testing.assert_close(margin.values, ordered.values[:, 2] - ordered.values[:, 3])
    for token in range(5):
        assert margin.last[token] in chosen[token]
        assert margin.next[token] not in chosen[token]
    assert margin.values.requires_grad
    with Choices() as choices:
        torch.topk(scores, 8, dim=-1)
        assert choices.take(5, 8) is None  # all are chosen: there is no next


def test_a_flip_costs_what_it_costs_once_the_margin_is_gone() -> None:
    response = Response(1, torch.tensor([[0.5]]), torch.tensor([[3.0]]), 2)
    slopes = torch.tensor([[0.0, 0.0, 0.0], [0.1, -0.4, -0.7]])[:, :, None]  # [G, E, N]
    np.testing.assert_allclose(response.flips(slopes), [0.0, 0.0, 1.5], atol=0.02)
    np.testing.assert_array_equal(response.smooth(slopes), 0.0)


def test_experts_that_cannot_be_taken_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="experts cannot be looked at"):
        Build(
            sure_model("jetmoe"), random_text(2), Named("j", "t"), MapSettings(), tmp_path / "m"
        ).run()


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert rank_correlation([1], [1]) is None
    assert rank_correlation([1, 1], [1, 2]) is None
