"""Bounds of their own for all experts at once: kept by each, and gone without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_bits import all_bits, as_bits, changed
from moebound import decode, encode
from moebound.errors import CodecError, MoeboundError
from moebound.model import LiveExperts, live_experts
from moebound.plan import Plan, PlannedExpert
from moebound.sensitivity.noise import matrix_stats
from moebound.sensitivity.perturb import perturbed
from moebound.sensitivity.planned import planned
from moebound.types import ErrorBound, ExpertKey, TensorStats
from tiny_models import tiny_model

Own = dict[ExpertKey, dict[str, ErrorBound]]


def rates(seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {role: float(np.exp(rng.uniform(-3, 0.5))) for role in ("gate", "up", "down")}


def plan(own: Own, method: str = "bounded:bound", **methods: str) -> Plan:
    """methods: of experts, by place."""
    experts = tuple(
        PlannedExpert(key, bounds, 1, 1, method=methods.get(f"at{place}"))
        for place, (key, bounds) in enumerate(own.items())
    )
    return Plan(method, "uniform", {"bpw": 3.0}, "tiny", 1, experts)


def alike(live: LiveExperts, bound: ErrorBound) -> Own:
    return {key: dict.fromkeys(map(str, live[key].roles), bound) for key in live}


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "nemotron_h", "jetmoe"])
def test_each_matrix_has_its_own_bound(name: str) -> None:
    model = tiny_model(name)
    live = live_experts(model)
    before = all_bits(model)
    own: Own = {
        key: {role: ErrorBound(rates(number)[role], "rate", "expert") for role in expert.roles}
        for number, (key, expert) in enumerate(live.items())
    }
    want, n_bytes = {}, 0
    for key, expert in live.items():
        whole = sum((matrix_stats(m) for m in expert.matrices.values()), TensorStats())
        for role, matrix in expert.matrices.items():
            data = encode(matrix.contiguous(), own[key][role].absolute(whole))
            again = decode(data)
            assert isinstance(again, torch.Tensor)
            want[key, role] = again
            n_bytes += len(data)
    with planned(live, plan(own)) as found:
        for key, expert in live.items():
            for role, matrix in expert.matrices.items():
                assert torch.equal(as_bits(matrix), as_bits(want[key, role]))
        assert found == n_bytes
    assert not changed(before, model)


def test_projections_that_the_checkpoint_keeps_together() -> None:
    model = tiny_model("deepseek_v3")
    live = live_experts(model)
    narrow, wide = (ErrorBound(rate, "rate", "expert") for rate in (0.05, 1.0))
    apart = {key: {"gate": narrow, "up": narrow, "down": wide} for key in live}
    with planned(live, plan(apart)):
        want = all_bits(model)
    together: Own = {key: {"gate_up": narrow, "down": wide} for key in live}
    with planned(live, plan(together)):
        assert not changed(want, model)
    # A bound of one matrix is relative to that matrix.
    of_matrix = ErrorBound(0.3, "rate", "matrix")
    with planned(live, plan(alike(live, of_matrix))):
        key = next(iter(live))
        new = live[key].matrices["down"].clone()
    old = live[key].matrices["down"]
    assert 0 < float((new - old).abs().max()) <= 0.3 * matrix_stats(old).mean_abs


def test_bounds_that_do_not_fit_change_nothing() -> None:
    model = tiny_model("deepseek_v3")
    live = live_experts(model)
    before = all_bits(model)
    bound = ErrorBound(0.3, "rate", "expert")
    good: Own = alike(live, bound)
    first, *others, last = good
    wrong: list[tuple[Own, str]] = [
        (
            {key: good[key] for key in (first, *others)},
            f"nothing planned for {last}, which the model has",
        ),
        ({**good, first._replace(layer=77): good[first]}, "layer 77 expert 0, which .* has not"),
        ({**good, last: {"up": good[last]["up"]}}, f"{last}: no bound for gate, only for up"),
    ]
    for bad, message in wrong:
        with pytest.raises(MoeboundError, match=message), planned(live, plan(bad)):
            pass
        assert not changed(before, model)
    with pytest.raises(CodecError), planned(live, plan(good, "bounded:nothing")):
        pass
    with (
        perturbed(live.pick([first]), "gaussian-sd", ErrorBound(0.3)),
        pytest.raises(MoeboundError, match="perturbed already"),
        planned(live, plan(good)),
    ):
        pass
    assert not changed(before, model)


def test_experts_may_have_methods_of_their_own() -> None:
    model = tiny_model("deepseek_v3")
    live = live_experts(model)
    before = all_bits(model)
    own = alike(live, ErrorBound(0.1, "rate", "expert"))
    first, second, *_ = own
    with planned(live, plan(own)):
        bounded = {key: as_bits(live[key].matrices["down"]).clone() for key in (first, second)}
    own[first] = {}
    with planned(live, plan(own, at0="rtn:int4:g8")) as n_bytes:
        assert not torch.equal(as_bits(live[first].matrices["down"]), bounded[first])
        assert torch.equal(as_bits(live[second].matrices["down"]), bounded[second])
        assert n_bytes > 0
    assert not changed(before, model)
