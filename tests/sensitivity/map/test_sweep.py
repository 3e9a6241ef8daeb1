"""The sweep with re-use finds what a pass of the whole model over the whole text finds."""

from __future__ import annotations

import pytest
import torch

from moebound.evaluate.kl import kl
from moebound.evaluate.replay import Replay, baseline, decoder_layers
from moebound.model import live_experts
from moebound.model.calls import listen
from moebound.sensitivity.decoded import Original
from moebound.sensitivity.map.observe import observe
from moebound.sensitivity.map.predict import Layer, replaced
from moebound.sensitivity.map.sweep import measure_experts, measure_whole
from moebound.types import ExpertKey

from .texts import random_text, sure_model

TOKENS = 64


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "gpt_oss", "llama4_text", "granitemoe"])
def test_equal_to_brute_force(name: str) -> None:
    """On families with other routers, packings, biases, and ways of calling their experts."""
    model, text = sure_model(name), random_text()
    live = live_experts(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    place = len(live.stacks) - 1
    entry = live.stacks[place]
    layers = decoder_layers(model, entry)
    base = baseline(model, text, layers, [entry.layer], TOKENS)
    seen = observe(
        model, text, live.stacks, [place], ties=[[]] * text.n_sequences, n_probes=1, seed=0,
        tokens=TOKENS,
    )[place]  # fmt: skip
    keys = [ExpertKey(entry.layer, entry.first + e) for e in range(entry.stack.n_experts)]
    originals = [Original.of(live[key]) for key in keys]
    layer = Layer(originals, seen, 1)
    weights = [original.decoded_at(0.8, "bound")[0] for original in originals]
    replay = Replay(model, text, layers, entry, base)
    assert replay.starts_at == entry.layer
    found = measure_experts(replay, [layer.change(weights)], range(len(keys)), tokens=TOKENS)[0]
    for index in range(len(keys)):
        with replaced([originals[index]], [weights[index]]):
            want = measure_whole(model, text, base.logits, tokens=TOKENS)
        assert found[index] == pytest.approx(want, rel=1e-4, abs=1e-10)
    assert found.max() > 1e-7
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in layers)


def test_a_layer_that_looks_further_back_makes_the_whole_model_run() -> None:
    model, text = sure_model("mixtral"), random_text()
    live = live_experts(model)
    entry = live.stacks[1]
    layers = decoder_layers(model, entry)
    kept: list[torch.Tensor] = []
    layers[0].register_forward_hook(lambda _m, _a, output: kept.append(output * 0.5))
    layers[1].register_forward_hook(lambda _m, _a, output: output + kept[-1])
    base = baseline(model, text, layers, [1], TOKENS)
    replay = Replay(model, text, layers, entry, base)
    assert replay.starts_at == 0
    rows = torch.tensor([2, 2, 4])
    still = torch.zeros(3, text.longest(rows), 32)
    found = replay.logits(rows, still)
    for place, row in enumerate(rows.tolist()):
        got = found[place][text.scored[row, : found.shape[1]]]
        torch.testing.assert_close(got, base.logits[row], rtol=1e-4, atol=1e-5)


def test_kl() -> None:
    a, b = torch.randn(7, 5), torch.randn(7, 5)
    want = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True,
                                      reduction="none").sum(-1)  # fmt: skip
    torch.testing.assert_close(kl(a, b).float(), want, rtol=1e-5, atol=1e-6)
    assert kl(a, a + 3).abs().max() < 1e-12
    sure = torch.tensor([[0.0, -torch.inf]])
    assert float(kl(sure, sure)) == 0.0
    assert float(kl(sure, torch.full((1, 2), torch.nan))) == torch.inf


def test_listening_changes_nothing() -> None:
    model, text = sure_model("mixtral"), random_text(2)
    inputs = text.inputs(slice(0, 2), model.device)
    with torch.no_grad():
        before = model(**inputs).logits
        handle = listen(live_experts(model).stacks[0].stack, lambda: inputs["input_ids"].numel(),
                        lambda _pairs, _output: None)  # fmt: skip
        during = model(**inputs).logits
        handle.remove()
    assert torch.equal(before, during)
