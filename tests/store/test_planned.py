"""A store made by a plan: every expert's own bound, at the size that was predicted, checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moebound.checkpoint import open_checkpoint
from moebound.codec import encode, stats
from moebound.errors import CodecError, PlanError, StoreError
from moebound.plan import RATES, Budget, Evidence, Measured, Plan, PlannedExpert, make_plan
from moebound.plan.items import Items
from moebound.plan.plan import planned_experts
from moebound.score import Score
from moebound.store import compress, decompress, measure_sizes, open_store, plan_of, verify
from moebound.store.card import Measurement, model_card, read_measurement, write_card
from moebound.types import ErrorBound, ExpertKey, TensorStats

from .conftest import MakeSource, run


def uneven(src: Path, *, seed: int = 0) -> Plan:
    """Another rate of the grid for every matrix."""
    sizes = measure_sizes(open_checkpoint(src), jobs=2)
    items = Items.of(sizes, per_role=True)
    rates = np.random.default_rng(seed).choice(RATES[6:22], len(items.keys))
    return Plan(
        "bounded:bound", "uniform", {"bpw": 4.0}, "tiny", sum(e.n_bytes for e in sizes),
        planned_experts(items, rates),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "gpt_oss", "nemotron_h"])
def test_every_expert_keeps_its_own_bound(name: str, source: MakeSource, tmp_path: Path) -> None:
    src, dst = source(name), tmp_path / "dst"
    plan, checkpoint = uneven(src), open_checkpoint(source(name))
    summary = run(src, dst, bound=plan)
    assert summary.expert_bytes_after == plan.n_bytes  # headers dominate, and are counted
    assert summary.worst is not None
    assert 0.9 < summary.worst <= 1
    report = verify(dst, against=checkpoint)
    assert report.ok, report.problems
    store = open_store(dst)
    assert plan_of(store) == plan
    assert store.settings.bound == plan.widest
    for expert in checkpoint.experts():
        arrays = {m.role: checkpoint.read(m).astype(np.float64) for m in expert.matrices}
        mean = sum(np.abs(a).sum() for a in arrays.values()) / expert.size
        for role, decoded in store.decode_expert(expert.key).items():
            error = np.abs(decoded.astype(np.float64) - arrays[role]).max()
            assert error <= plan[expert.key].bounds[role].value * mean * (1 + 1e-12)


def test_sizes_are_those_of_encode(source: MakeSource) -> None:
    checkpoint = open_checkpoint(source())
    found = measure_sizes(checkpoint, ranks=True, jobs=2)
    assert [sizes.key for sizes in found] == [expert.key for expert in checkpoint.experts()]
    expert, sizes = checkpoint.experts()[3], found[3]
    arrays = [checkpoint.read(matrix) for matrix in expert.matrices]
    whole = sum((stats(array) for array in arrays), TensorStats())
    assert sizes.mean_abs == whole.mean_abs
    assert 1 < (sizes.effective_rank or 0) <= 32
    for matrix, array in zip(expert.matrices, arrays, strict=True):
        written = [len(encode(array, float(rate * whole.mean_abs))) for rate in RATES[::6]]
        assert sizes.sizes[matrix.role][::6].tolist() == written


def test_a_budget_is_what_the_store_then_has(source: MakeSource, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source())
    sizes = measure_sizes(checkpoint, jobs=2)
    plan = make_plan(sizes, Evidence(), Budget(bpw=6), source="tiny")
    summary = compress(checkpoint, tmp_path / "dst", bound=plan)
    assert summary.expert_bits_per_weight == pytest.approx(6, rel=0.01)
    assert summary.expert_bytes_after == pytest.approx(plan.n_bytes, rel=0.01)


def test_another_plan_is_another_run(
    source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = source(), tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr("moebound.store.beside.write_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(src, dst, bound=uneven(src))
    other = uneven(src, seed=1)
    with pytest.raises(StoreError, match=r"unfinished work of another run .*plan was"):
        run(src, dst, bound=other)
    assert run(src, dst, bound=uneven(src)).resumed
    with pytest.raises(StoreError, match="another store than this source, bound or plan"):
        run(src, dst, bound=other, on_existing="resume")
    assert run(src, dst, bound=uneven(src), on_existing="resume").resumed
    with pytest.raises(StoreError, match="another store"):
        run(src, dst, bound=uneven(src).widest, on_existing="resume")


def test_plans_that_do_not_fit(source: MakeSource, tmp_path: Path) -> None:
    src, dst = source(), tmp_path / "dst"
    plan = uneven(src)
    extra = PlannedExpert(ExpertKey(9, 0), {"up": ErrorBound(0.1, "rate", "expert")}, 1, 1)
    for bad, message in (
        (replace(plan, experts=plan.experts[1:]), "lacks layer 1 expert 0"),
        (replace(plan, experts=(*plan.experts, extra)), "has layer 9 expert 0, which the"),
    ):
        with pytest.raises(PlanError, match=message):
            run(src, dst, bound=bad)
    with pytest.raises(PlanError, match="'bounded:raw': the plan was made for 'bounded:bound'"):
        run(src, dst, bound=plan, codec="raw")
    with pytest.raises(CodecError, match="nosuch"):
        run(src, dst, bound=replace(plan, method="bounded:nosuch"))
    with pytest.raises(PlanError, match="no layers and experts beside it"):
        run(src, dst, bound=plan, layers={1})
    assert list(tmp_path.iterdir()) == []


def test_a_stores_plan_is_checked(source: MakeSource, tmp_path: Path) -> None:
    src, dst = source(), tmp_path / "dst"
    plan = uneven(src)
    run(src, dst, bound=plan)
    file = dst / "moebound.plan.json"
    written = file.read_bytes()
    uneven(src, seed=1).save(file)
    messages = [p.message for p in verify(dst).problems if p.tensor == file.name]
    assert any("not the plan that config.json names" in message for message in messages)
    file.unlink()
    assert any(p.tensor == file.name for p in verify(dst).problems)
    with pytest.raises(StoreError, match="missing"):
        plan_of(open_store(dst))
    # Certificates that promise otherwise, in a store whose hashes all agree.
    file.write_bytes(written)
    other = uneven(src, seed=1)
    other.save(file)
    config = json.loads((dst / "config.json").read_text())
    config["quantization_config"]["plan"] = other.sha256
    (dst / "config.json").write_text(json.dumps(config))
    problems = [p for p in verify(dst).problems if p.kind == "certificate"]
    assert problems
    assert all("planned rate" in p.message and "promised rate" in p.message for p in problems)


def test_back_to_a_checkpoint(source: MakeSource, tmp_path: Path) -> None:
    run(source(), tmp_path / "dst", bound=uneven(source()))
    decompress(tmp_path / "dst", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not {name for name in names if "moebound" in name or "original" in name}
    assert (tmp_path / "out" / "README.md").read_text() == "# tiny"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_card(source: MakeSource, tmp_path: Path) -> None:
    src, dst = source(), tmp_path / "dst"
    plan = uneven(src)
    summary = run(src, dst, bound=plan, source="someone/a-model")
    card = (dst / "README.md").read_text()
    for part in (
        "base_model: someone/a-model", "## Planned", f"{plan.n_bytes} (written: +0.00 %)",
        f"| {summary.expert_bits_per_weight:.3f} |", "from_pretrained", "moebound verify",
        "predicted KL, nats per token | not known",
    ):  # fmt: skip
        assert part in card, part
    assert "Measured" not in card
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(
        '{"task": "wordmath", "n": 500, "pia": {"value": 0.95, "low": 0.93, "high": 0.97},'
        ' "answers": [1, 2], "note": "a|b"}'
    )
    write_card(dst, [read_measurement(evaluation)])
    card = (dst / "README.md").read_text()
    assert "### wordmath\n" in card
    assert "| pia | 0.95 (0.93 to 0.97) |" in card
    assert "| n | 500 |" in card
    assert "a b" in card
    assert verify(dst).ok  # a document, which no hash covers
    evaluation.write_text("[]")
    with pytest.raises(StoreError, match=r"eval.json: expected what"):
        read_measurement(evaluation)


def test_the_card_has_what_was_measured_of_the_plan(source: MakeSource, tmp_path: Path) -> None:
    found = Score(0.0381, 0.0029, answer_kl_nats=0.00213, answer_kl_stderr=3.21e-4, n_problems=256)
    plan = replace(uneven(source()), measured=Measured(found, "word|math"))
    run(source(), tmp_path / "dst", bound=plan)
    card = (tmp_path / "dst" / "README.md").read_text()
    assert "| measured KL, answers, nats per token | 0.00213 ± 0.00032 |" in card
    assert "| measured KL, all text, nats per token | 0.0381 ± 0.0029 |" in card
    assert "| measured on | 256 problems of word math that planning did not see |" in card


def test_a_card_without_a_plan_is_no_hub_model(shared_store: object, source: MakeSource) -> None:
    checkpoint = open_checkpoint(source())
    settings = open_store(shared_store()[1]).settings  # type: ignore[operator]
    assert settings.source == checkpoint.path.name
    text = model_card(settings, {}, [], None, [Measurement("x.json", {})])
    assert "base_model" not in text
    assert "rate 0.1 per expert" in text
