"""The recipe of the built-in model, on a model of two layers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

FOLDER = Path(__file__).parents[2] / "recipes" / "wordmath"


@pytest.fixture(scope="module", autouse=True)
def recipe() -> Iterator[None]:
    """The recipe is a folder of scripts, not a package."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def small_model(architecture: str, experts: int = 8, layers: int = 3) -> Any:
    from architecture import ARCHITECTURES, new_model
    from moebound.wordmath.tokenizer import vocabulary

    torch.manual_seed(0)
    config = ARCHITECTURES[architecture].config
    model = new_model(config(len(vocabulary()), layers=layers, experts=experts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # larger than at the start of training: differences show
                parameter.mul_(4 if architecture == "deepseek" else 1)  # yet no choice flips
            assert "bias" not in name
    return model


def reference_loss(model: Any, batch: Any) -> torch.Tensor:
    """The same by transformers, in float32, row by row with padding."""
    logits = []
    for group in batch.groups:
        mask = torch.zeros(group.gather.numel(), dtype=torch.long)
        mask[group.scatter] = 1
        ids = batch.tokens[group.gather]
        out = model(input_ids=ids, attention_mask=mask.view_as(ids), use_cache=False).logits
        logits.append(out.flatten(0, 1)[group.scatter])
    return functional.cross_entropy(torch.cat(logits)[batch.solution], batch.targets)


ARCHITECTURES = ["deepseek", "mixtral"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.slow
def test_the_fast_forward_pass_is_that_of_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import routing
    from architecture import ARCHITECTURES
    from batches import batch

    monkeypatch.setattr(routing, "CAPACITY", 8.0)  # nothing is dropped
    model = small_model(name)
    data = batch(0, 0, 512, 0.5)
    expected = reference_loss(model, data)
    torch.autograd.backward([expected])
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rounded = ARCHITECTURES[name].loss(model, data)[1]
    assert rounded.item() == pytest.approx(expected.item(), rel=2e-3)  # products are in bfloat16
    # Without that rounding, which changes choices of experts, it is the same function.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    _, found, loads = ARCHITECTURES[name].loss(model, data)
    torch.autograd.backward([found])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    moe_layers, k = {"deepseek": (2, 6), "mixtral": (3, 2)}[name]
    assert [int(load.sum()) for load in loads] == [512 * k] * moe_layers
    for parameter, p in model.named_parameters():
        error = (p.grad - wanted[parameter]).norm() / wanted[parameter].norm()
        assert error < 1e-3, (parameter, float(error))


def test_the_balance_loss_is_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    import mixtral

    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    scores = logits.softmax(-1)
    load = torch.bincount(scores.topk(2)[1].flatten(), minlength=8)
    wanted = load_balancing_loss_func((logits,), 8, 2)
    assert mixtral._balance_loss(scores, load).item() == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.slow
def test_a_full_expert_drops_tokens_and_gradients_stay_finite() -> None:
    import deepseek
    from batches import batch

    model = small_model("deepseek")
    model.model.layers[1].mlp.gate.e_score_correction_bias[:6] += 5  # all tokens want the same
    found, _, loads = deepseek.loss(model, batch(0, 0, 256, 0.5))
    torch.autograd.backward([found])
    assert loads[0].tolist() == [256] * 6 + [0] * 2
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_batches_have_no_padding_and_ask_for_solutions_only() -> None:
    from batches import batch
    from moebound.wordmath.tokenizer import ANS, BOS, EOS, PAD

    data = batch(3, 7, 1024, 0.5)
    assert data.tokens.shape == (1024,)
    assert PAD not in data.tokens
    assert torch.equal(data.tokens[data.solution + 1], data.targets)
    starts = (data.tokens == BOS).nonzero().flatten().tolist()
    assert (data.positions[starts] == 0).all()
    # From <ans> on, and up to the end of each sequence: nothing else is asked for.
    asked = set(data.solution.tolist())
    for start, end in zip(starts, [*starts[1:], 1024], strict=True):
        row = data.tokens[start:end].tolist()
        if ANS in row:
            after = start + row.index(ANS)
            last = start + row.index(EOS) if EOS in row else end - 1
            assert asked & set(range(start, end)) == set(range(after, last))
    again = batch(3, 7, 1024, 0.5)
    assert torch.equal(again.tokens, data.tokens)
    assert not torch.equal(batch(3, 8, 1024, 0.5).tokens, data.tokens)


def test_muon_makes_singular_values_one() -> None:
    from optimizer import orthogonalised

    torch.manual_seed(0)
    stack = torch.randn(5, 32, 64).bfloat16()
    values = torch.linalg.svdvals(orthogonalised(stack).float())
    assert values.min() > 0.5
    assert values.max() < 1.3


def run(folder: Path, stopped: Sequence[int] = (), **changed: Any) -> Any:
    import train

    argv = [str(folder), "--steps", "4", "--tokens", "256", "--layers", "2", "--experts", "8"]
    argv += ["--threads", "1", "--evaluate-problems", "0", "--no-compile"]
    args = train.arguments().parse_args(argv)
    return train.train(argparse.Namespace(**{**vars(args), **changed}), stopped)


@pytest.mark.parametrize(
    ("architecture", "optimizer"), [("deepseek", "adamw"), ("mixtral", "muon")]
)
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    tmp_path: Path, architecture: str, optimizer: str
) -> None:
    kind: dict[str, Any] = {"architecture": architecture, "optimizer": optimizer}
    whole = run(tmp_path / "whole", **kind)
    run(tmp_path / "parts", **kind, stop_at=1)
    (tmp_path / "parts" / "checkpoint.pt.unfinished").write_bytes(b"killed while writing")
    run(tmp_path / "parts", **kind, stop_at=3)
    resumed = run(tmp_path / "parts", **kind)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_is_told_to_stop_saves_first(tmp_path: Path) -> None:
    import train

    with train.stop_on_signal() as stopped:
        assert not stopped
        os.kill(os.getpid(), signal.SIGTERM)
        run(tmp_path, stopped=stopped)
    assert stopped == [signal.SIGTERM]
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_a_run_becomes_a_folder_that_transformers_loads(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evaluation import answers, table
    from export import export
    from moebound.wordmath.problems import test_problems as held_out
    from moebound.wordmath.tokenizer import ANS, BOS

    trained = run(tmp_path / "run", architecture=architecture, keep_steps=2)
    assert (tmp_path / "run" / "weights-2.pt").exists()
    export(tmp_path / "run", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for (name, a), b in zip(trained.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    problem = held_out("wordmath", 1)[0]
    ids = tokenizer(problem.prompt)["input_ids"]
    assert (ids[0], ids[-1]) == (BOS, ANS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == problem.prompt
    lines = (tmp_path / "model" / "sample_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 200
    assert not {json.loads(line)["prompt"] for line in lines} & {
        p.prompt for p in held_out("wordmath")
    }
    texts = answers(model, [problem])
    assert "| all | 1 | 0.0 | 0.0 |" in table("wordmath", [problem], [problem.judge(texts[0])])
