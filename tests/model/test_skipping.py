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
from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded, Source
from moebound.model.live import live_experts
from moebound.model.skipping import skip, skipping
from tiny_models import MakeTiny

IDS = torch.arange(5, 25).view(2, 10)
MIXTRAL = "builtin:wordmath-mixtral"


def test_weights_below_the_ratio_are_given_to_the_others() -> None:
    index = torch.tensor([[4, 7, 2], [1, 0, 3]])
    weights = torch.tensor([[0.3, 0.5, 0.2], [0.4, 0.3, 0.3]])
    found, left, skipped = skip(index, weights, 0.5)
    assert skipped.tolist() == [[False, False, True], [False, False, False]]
    assert found.tolist() == [[4, 7, 7], [1, 0, 3]]
    torch.testing.assert_close(left, torch.tensor([[0.375, 0.625, 0.0], [0.4, 0.3, 0.3]]))
    assert not skip(index, weights, 0.0)[2].any()
    assert skip(index, weights, 1.0)[0].tolist() == [[7, 7, 7], [1, 1, 1]]  # one is always left


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
