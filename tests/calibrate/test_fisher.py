"""Statistics weighted by what the loss feels: autograd's own, whatever is read together."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebound.calibrate import Settings, Statistics, Text, collect, read_statistics
from moebound.calibrate.fisher import Labels
from moebound.cli.main import main
from moebound.errors import MoeboundError, UnsupportedArchitectureError
from moebound.evaluate.text import pad
from moebound.files.documents import load_json
from moebound.files.formats.statistics import FILE
from moebound.model import live_experts
from tiny_models import TINY, MakeTiny

from .test_collect import MIXTRAL, NOT_RUN, TEXT, loaded

FISHER = Settings(fisher=True)
SINGLE = Text("tokens", tuple((3 + i,) for i in range(25)))
"""Sequences of one token: the gradient by a matrix is then δ xᵀ, of one δ and one x."""
ROLES = ("gate", "up", "down")


def gradients(folder: Path) -> dict[Any, list[tuple[int, torch.Tensor]]]:
    """By expert and role: the gradient of each token's loss by the matrix, from autograd alone."""
    model = loaded(folder)
    labels, found = Labels(SINGLE), dict[Any, list[tuple[int, torch.Tensor]]]()
    for index, row in enumerate(SINGLE.rows):
        model.model.zero_grad()
        batch = pad([(row, ())], 0)
        logits = model.model(input_ids=batch.input_ids, use_cache=False).logits
        torch.autograd.backward(labels.loss(logits, batch, [index]))
        for entry in live_experts(model.model).stacks:
            for role, place in entry.stack.places.items():
                grad = entry.module.get_parameter(place.parameter).grad
                for expert in range(0 if grad is None else entry.stack.n_experts):
                    assert grad is not None
                    one = place.part(grad, expert).double()
                    if one.any():
                        key = entry.layer, entry.first + expert, role
                        found.setdefault(key, []).append((index, one.clone()))
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
def test_sums_are_those_of_autograd(name: str, tiny: MakeTiny, tmp_path: Path) -> None:
    folder = tiny(name)
    wanted = gradients(folder)
    found = collect(loaded(folder), SINGLE, tmp_path / "s", FISHER)
    reached = 0
    for key in found.keys:
        own = {role: wanted.get((key.layer, key.expert, role), []) for role in ROLES}
        inputs = sum(g.T @ g for role in ("gate", "up") for _, g in own[role])
        if not isinstance(inputs, torch.Tensor):
            assert not found.moments(key, "inputs").any()
            continue
        reached += 1
        scale = float(inputs.abs().max())
        assert np.abs(found.moments(key, "inputs") - inputs.numpy()).max() < 1e-4 * scale
        hidden = sum((g.T @ g for _, g in own["down"]), torch.zeros(()))
        scale = float(hidden.abs().max())
        assert np.abs(found.moments(key, "hidden") - hidden.numpy()).max() < 1e-4 * scale
        for role in ROLES:  # δ_i² is what a row of δ xᵀ has of |δ|², which is its largest value's
            fisher = found.array(key, f"{role}_rows")
            assert fisher.shape == (own[role][0][1].shape[0],)
            assert (fisher >= 0).all()
            if len(own[role]) == 1:
                shares = own[role][0][1].square().sum(1).numpy()
                np.testing.assert_allclose(fisher / fisher.sum(), shares / shares.sum(), rtol=1e-3,
                                           atol=1e-6)  # fmt: skip
    assert reached > 2


def same(a: Statistics, b: Statistics, rtol: float) -> None:
    for key in a.keys:
        for name in ("inputs", "hidden", "gate_rows", "up_rows", "down_rows"):
            x, y = a.array(key, name), b.array(key, name)
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(np.abs(y).max(), 1e-30))


def test_what_is_read_together_does_not_matter(
    tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes for a part of the experts see the same labels, and so do smaller batches."""
    folder = tiny("qwen3_moe")
    model = loaded(folder)
    before = [p.requires_grad for p in model.model.parameters()]
    whole = collect(model, TEXT, tmp_path / "whole", FISHER)
    assert [p.requires_grad for p in model.model.parameters()] == before
    assert all(p.grad is None for p in model.model.parameters())
    same(collect(model, TEXT, tmp_path / "parts", Settings(fisher=True, memory=9000)), whole, 1e-6)
    monkeypatch.setattr(sys.modules["moebound.calibrate.collect"], "FISHER_TOKENS", 1)
    same(collect(model, TEXT, tmp_path / "alone", FISHER), whole, 1e-3)
    other = Text("rows", TEXT.rows[::-1])
    assert collect(model, other, tmp_path / "other", FISHER).of.text_sha256 != whole.of.text_sha256


def test_a_diagonal_is_that_of_the_whole(tiny: MakeTiny, tmp_path: Path) -> None:
    model = loaded(tiny("mixtral"))
    whole = collect(model, TEXT, tmp_path / "whole", FISHER)
    some = collect(model, TEXT, tmp_path / "some", Settings(fisher=True, moments="diagonal"))
    for key in whole.keys:
        diagonal = whole.moments(key, "hidden").diagonal()
        np.testing.assert_allclose(some.moments(key, "hidden"), diagonal, rtol=1e-4, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TINY) - NOT_RUN))
def test_what_is_computed_again_has_the_same_bits(
    name: str, tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every family: keeping all activations, or what enters each layer."""
    model, text = loaded(tiny(name)), Text("rows", ((3, 4, 5, 6), (7, 8)))
    try:
        again = collect(model, text, tmp_path / "again", FISHER)
    except MoeboundError:
        return  # a family without a loss, or whose gradients cannot be told apart: refused
    assert not any("forward" in vars(module) for module in model.model.modules())
    monkeypatch.setattr(sys.modules["moebound.calibrate.collect"], "decoder_layers", lambda *_: [])
    monkeypatch.setattr(sys.modules["moebound.calibrate.fisher"], "_DRAWN_TOKENS", 1 << 20)
    kept = collect(model, text, tmp_path / "kept", FISHER)
    for part in kept.parts:
        assert (kept.folder / part.file).read_bytes() == (again.folder / part.file).read_bytes()


@pytest.mark.parametrize("name", ["llama4", "jetmoe", "muse_spark_text"])
def test_families_without_gradients_are_refused(name: str, tiny: MakeTiny, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"--fisher|one by one"):
        collect(loaded(tiny(name)), TEXT, tmp_path / "s", FISHER)


def test_answers_count_so_many_times(tiny: MakeTiny, tmp_path: Path) -> None:
    model, weighted = loaded(tiny("mixtral")), Settings(fisher=True, answer_weight=4.0)
    plain = collect(model, TEXT, tmp_path / "plain", FISHER)
    assert "answer_weight" not in load_json(tmp_path / "plain" / FILE)
    # The prediction behind a prompt of one token is an answer's already.
    answers = replace(TEXT, prompts=(1,) * len(TEXT.rows))
    found = collect(model, answers, tmp_path / "answers", weighted)
    assert read_statistics(tmp_path / "answers").of.answer_weight == 4
    asked = replace(TEXT, prompts=tuple(len(row) + 1 for row in TEXT.rows))
    same(collect(model, asked, tmp_path / "asked", weighted), plain, 1e-6)
    half = replace(TEXT, prompts=tuple(len(row) // 2 for row in TEXT.rows))
    between = collect(model, half, tmp_path / "half", weighted)
    for key in plain.keys:
        for name in ("inputs", "hidden", "gate_rows", "up_rows", "down_rows"):
            one, four = plain.array(key, name), found.array(key, name)
            np.testing.assert_allclose(four, 4 * one, rtol=1e-4, atol=1e-5 * np.abs(four).max())
        if plain.array(key, "down_rows").any():
            sums = [some.array(key, "down_rows").sum() for some in (plain, between, found)]
            assert sums[0] < sums[1] < sums[2]
    with pytest.raises(MoeboundError, match=r"count 4 times .* has 0 prompts"):
        collect(model, TEXT, tmp_path / "none", weighted)
    with pytest.raises(MoeboundError, match=r"another run \(answer_weight is 4.0"):
        collect(model, answers, tmp_path / "answers", FISHER)


def test_all_tokens_feel_nothing(tiny: MakeTiny, tmp_path: Path) -> None:
    with pytest.raises(MoeboundError, match="--all-tokens"):
        collect(loaded(tiny("mixtral")), TEXT, tmp_path / "s", Settings(routed=False, fisher=True))


def test_versions(tiny: MakeTiny, tmp_path: Path) -> None:
    """Version 3 is written where something of it is, and an array that is not there is named."""
    model = loaded(tiny("mixtral"))
    plain = collect(model, TEXT, tmp_path / "plain")
    fisher = collect(model, TEXT, tmp_path / "fisher", FISHER)
    assert json.loads((plain.folder / FILE).read_text())["version"] == 2
    assert json.loads((fisher.folder / FILE).read_text())["version"] == 3
    assert read_statistics(fisher.folder).of.fisher
    assert not read_statistics(plain.folder).of.fisher
    with pytest.raises(MoeboundError, match="calibrate --fisher"):
        plain.array(plain.keys[0], "up_rows")
    with pytest.raises(MoeboundError, match="of another run"):
        collect(model, TEXT, tmp_path / "plain", FISHER)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["calibrate", MIXTRAL, "--task", "wordmath", "--limit", "2", "--fisher", "--json"]
    assert main([*asked, "-o", str(tmp_path / "s")]) == 0
    assert json.loads(capsys.readouterr().out)["fisher"] is True
    assert main([*asked, "-o", str(tmp_path / "t"), "--all-tokens"]) == 2
    assert "--all-tokens" in capsys.readouterr().err
    assert main([*asked, "-o", str(tmp_path / "w"), "--answer-weight", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["answer_weight"] == 16
    text = tmp_path / "text"
    text.write_text("one two three", encoding="utf-8")
    of_file = ["calibrate", MIXTRAL, "--text", str(text), "-o", str(tmp_path / "v")]
    for wrong in (["--fisher"], []):
        assert main([*of_file, *wrong, "--answer-weight", "16"]) == 2
        assert "--answer-weight goes with --fisher and --task" in capsys.readouterr().err
