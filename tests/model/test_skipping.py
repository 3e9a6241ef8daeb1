"""Skipping of experts with little weight: which, what becomes of the others, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moebound
from moebound.calibrate import Text, collect
from moebound.cli.main import main
from moebound.errors import MoeboundError, UnsupportedArchitectureError
from moebound.evaluate.loading import Loaded, Source
from moebound.model.coarse_copies import skipping_with_copies
from moebound.model.live import live_experts
from moebound.model.skip_policies import HobbitRe, LuRe, OdpRe, get_policy
from moebound.model.skipping import _Passes, skipping, without
from tiny_models import MakeTiny

IDS = torch.arange(5, 25).view(2, 10)
MIXTRAL = "builtin:wordmath-mixtral"


def test_weights_below_the_ratio_are_given_to_the_others() -> None:
    index = torch.tensor([[4, 7, 2], [1, 0, 3]])
    weights = torch.tensor([[0.3, 0.5, 0.2], [0.4, 0.3, 0.3]])
    skipped = LuRe({0: 0.5}).skips(0, weights)
    assert skipped.tolist() == [[False, False, True], [False, False, False]]
    found, left = without(index, weights, skipped, rescale=True)
    assert found.tolist() == [[4, 7, 7], [1, 0, 3]]
    torch.testing.assert_close(left, torch.tensor([[0.375, 0.625, 0.0], [0.4, 0.3, 0.3]]))
    assert not LuRe({0: 0.0}).skips(0, weights).any()
    one = LuRe({0: 1.0}).skips(0, weights)
    found, left = without(index, weights, one, rescale=True)
    assert found.tolist() == [[7, 7, 7], [1, 1, 1]]  # one is always left
    torch.testing.assert_close(left, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))


def test_what_is_kept_stands_first_in_its_order() -> None:
    """So that the place where an expert is met first is the one with its weight, also where a
    router does not sort; and the weights of the others may be left as they are."""
    index, weights = torch.tensor([[4, 7, 2]]), torch.tensor([[0.1, 0.5, 0.4]])
    found, left = without(index, weights, torch.tensor([[True, False, False]]), rescale=False)
    assert found.tolist() == [[7, 2, 7]]
    torch.testing.assert_close(left, torch.tensor([[0.5, 0.4, 0.0]]))


def test_padding_is_not_counted(tiny: MakeTiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    with torch.inference_mode(), skipping(model, {0: 1.0, 1: 1.0}) as counts:
        model(IDS, attention_mask=mask)
    assert (counts.pairs, counts.skipped) == (2 * 17 * 2, 2 * 17)


def test_tokens_that_matter_keep_all_their_experts(tiny: MakeTiny) -> None:
    """By |x|_1 times the attention that a token gets from those behind it, on average over these;
    padding neither gives nor is protected. Attention is computed as before afterwards."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    before = model.config._attn_implementation
    policy = OdpRe("odp_re", {0: 1.0, 1: 1.0}, frozenset({0, 1}), 0.45)
    attentions, inputs = list[torch.Tensor](), list[tuple[torch.Tensor, torch.Tensor]]()

    def attended(_module: Any, _args: Any, output: Any) -> None:
        attentions.append(output[1])

    def asked(_module: Any, args: Any) -> None:
        inputs.append((args[0].view(2, 10, -1), args[1].view(2, 10, -1)))

    with torch.inference_mode(), skipping(model, policy) as counts:
        assert model.config._attn_implementation == "eager"
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(attended)
            layer.mlp.experts.register_forward_pre_hook(asked)
        model(IDS, attention_mask=mask)
    assert model.config._attn_implementation == before
    for attention, (x, index) in zip(attentions, inputs, strict=True):
        for row, length in ((0, 10), (1, 7)):
            sizes = x[row].abs().sum(-1)
            importance = [
                float(sizes[j] * attention[row, :, j:length, j].mean(0).sum() / (length - j))
                for j in range(length)
            ]
            best = sorted(range(length), key=lambda j: -importance[j])[: int(0.45 * length)]
            two = [j for j in range(10) if len(set(index[row, j].tolist())) > 1]
            assert two == sorted(best)
    assert (counts.pairs, counts.skipped) == (2 * 17 * 2, 2 * (17 - 4 - 3))


@pytest.mark.parametrize("setting", ["hobbit_re:low0.3:above0.6", "hobbit_re:low0.3:renorm"])
def test_coarse_copies_compute_what_stands_between_the_two_shares(
    setting: str, tiny: MakeTiny
) -> None:
    """Against a loop over each token's experts by hand."""
    src = tiny("mixtral")
    model: Any = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    other: Any = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    experts, copies = (m.model.layers[0].mlp.experts for m in (model, other))
    with torch.no_grad():
        copies.down_proj.mul_(1.5)
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    index = torch.arange(4).repeat(12, 1)
    weights = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)).softmax(-1)
    policy = get_policy(setting)
    assert isinstance(policy, HobbitRe)
    with torch.inference_mode():
        outputs = [
            torch.stack([m(x, index[:, :1] + e, torch.ones(12, 1)) for e in range(4)], 1)
            for m in (experts, copies)
        ]
        with skipping_with_copies(model, policy, other) as counts:
            found = experts(x, index, weights)
    n_coarse = 0
    for token in range(12):
        kept, before = dict[int, int](), 0.0
        for expert in weights[token].argsort(descending=True).tolist():
            if before <= policy.above:
                kept[expert] = int(before > policy.low)
            before += float(weights[token, expert])
        scale = float(1 / weights[token, list(kept)].sum()) if policy.rescales else 1.0
        wanted = sum(scale * weights[token, e] * outputs[low][token, e] for e, low in kept.items())
        torch.testing.assert_close(found[token], wanted)
        n_coarse += sum(kept.values())
    assert counts.coarse == n_coarse > 0
    with pytest.raises(MoeboundError, match="lu_re has no use for coarser copies"):
        skipping_with_copies(model, LuRe({}), other).__enter__()
    other = AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"), dtype=torch.float32)
    with pytest.raises(MoeboundError, match="its experts are not those of the model"):
        skipping_with_copies(model, policy, other).__enter__()


class Cut(torch.nn.Module):
    pass


def test_attention_that_gives_no_weights_is_named() -> None:
    passes = _Passes()
    with pytest.raises(UnsupportedArchitectureError, match="odp_re:protect0 protects none"):
        passes.attended(Cut(), None, (torch.zeros(1), None))


def test_the_same_as_a_model_that_chooses_fewer(tiny: MakeTiny) -> None:
    """At a ratio of 1 one expert is left, with the weight of all: Mixtral with top-1. Whole or
    offloaded; and afterwards nothing is left of it."""
    src = tiny("mixtral")
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    betas = {0: 1.0, 1: 1.0}
    with torch.inference_mode():
        before = model(IDS).logits
        with skipping(model, betas) as counts:
            found = model(IDS).logits
        assert torch.equal(model(IDS).logits, before)
        one: Any = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
        for layer in one.model.layers:
            layer.mlp.gate.top_k = 1
        assert torch.allclose(found, one(IDS).logits, atol=1e-6)
        assert (counts.pairs, counts.skipped) == (2 * 20 * 2, 2 * 20)
        with moebound.load(src, dtype="float32") as offloaded, skipping(offloaded.model, betas):
            assert torch.allclose(offloaded.model(IDS).logits, found, atol=1e-5)
    with pytest.raises(MoeboundError, match="no threshold of layer 1"), skipping(model, {0: 1.0}):
        pass


def test_medians_are_those_of_the_text(tiny: MakeTiny, tmp_path: Path) -> None:
    """Half of the pairs behind the first are skipped by them."""
    src = tiny("mixtral")
    model: Any = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    rows = tuple(tuple(range(3 + i, 30 + 2 * i)) for i in range(5))
    loaded = Loaded(model, None, Source("m", "checkpoint", "float32", "its own"))
    found = collect(loaded, Text("rows", rows), tmp_path / "s").median_ratios()
    ratios: dict[int, list[float]] = {0: [], 1: []}
    for layer, module in live_experts(model).modules.items():
        module.register_forward_pre_hook(
            lambda _, args, layer=layer: ratios[layer].extend(
                (args[2].min(1).values / args[2].max(1).values).tolist()
            )
        )
    with torch.inference_mode(), skipping(model, found) as counts:
        for row in rows:
            model(torch.tensor([row]))
    for layer, values in ratios.items():
        assert found[layer] == pytest.approx(float(np.median(values)), abs=1.5 / 256)
    assert counts.share == pytest.approx(0.25, abs=0.03)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = tmp_path / "s"
    asked = ["--task", "wordmath", "--limit", "4", "--json"]
    assert main(["calibrate", MIXTRAL, *asked, "--diagonal", "-o", str(stats)]) == 0
    capsys.readouterr()
    assert main(["eval", MIXTRAL, *asked, "--skip", "lu_re", "--calibration", str(stats)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["skipping"]["policy"] == "lu_re"
    assert 0.1 < document["skipping"]["share"] < 0.4
    assert main(["eval", MIXTRAL, *asked, "--skip", "lu_re"]) == 2
