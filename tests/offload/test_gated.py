"""Experts of codes that the kernel computes row by row: which they are, and that company, the way
and the budget change no bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as hf_logging

from moebound.checkpoint import open_checkpoint
from moebound.model import few_rows
from moebound.offload import compute
from moebound.offload.compute import FewRows, expert_output, few_rows_outputs, row_by_row
from moebound.offload.loading import load
from moebound.offload.offloaded import Offloaded
from moebound.offload.slots import Slot
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny

IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(name, ...) -> a store. Not to be changed."""
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    stores = dict[tuple[str, bool], Path]()

    def make(name: str, *, some: bool = False) -> Path:
        if (name, some) not in stores:
            folder = tmp_path_factory.mktemp(name)
            src = open_checkpoint(make_tiny(name, folder / "src"))
            experts = {"experts": {1}} if some else {}
            compress(src, folder / "dst", bound=ErrorBound(0.9, "rate"), **experts)  # type: ignore[arg-type]
            stores[name, some] = folder / "dst"
        return stores[name, some]

    return make


def experts_of(offloaded: Offloaded) -> tuple[Any, list[Slot]]:
    """The first experts module, and copies of all its experts."""
    module = next(m for m in offloaded.model.modules() if hasattr(m, "moebound"))
    layer, every = module.moebound, torch.arange(module.num_experts).unsqueeze(1)
    found = dict[int, Slot]()

    def keep(some: Mapping[int, Slot | None], threads: int) -> None:
        found.update({number: slot.copy() for number, slot in some.items() if slot is not None})

    offloaded._fetcher.visit(layer.layer, layer.first, every, torch.ones_like(every), every, keep)
    return module, [slot for _, slot in sorted(found.items())]


@pytest.mark.parametrize(
    ("name", "known"),
    [("mixtral", True), ("lfm2_moe", True), ("gemma4_text", False), ("nemotron_h", False)],
)
def test_whose_gate_the_kernel_knows(name: str, known: bool, made: Callable[..., Path]) -> None:
    with load(made(name), dtype="float32", slots="codes", ram_budget="100%") as offloaded:
        module, (slot, *_) = experts_of(offloaded)
        assert row_by_row(module, slot, torch.float32) == known
        assert not row_by_row(module, slot, torch.bfloat16)  # as of a model that was cast
        rows = torch.randn(3, offloaded.model.config.hidden_size)
        inner = slot.project(slot.kind.shapes[0][0], rows)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        by_torch = slot.project("down_proj", inner)
        found = expert_output(module, 0, slot, rows, torch.float32)
        assert torch.equal(found, by_torch) or (known and (found - by_torch).abs().max() < 1e-6)


def test_whose_gate_is_another_is_left_to_it(made: Callable[..., Path]) -> None:
    with load(made("mixtral"), dtype="float32", slots="codes", ram_budget="100%") as offloaded:
        module, (slot, *_) = experts_of(offloaded)
        known = module.act_fn
        for other in (nn.GELU(), nn.SiLU(), known):
            hook = other.register_forward_hook(lambda *_: None)
            module.act_fn = other
            assert not row_by_row(module, slot, torch.float32)
            hook.remove()
            assert row_by_row(module, slot, torch.float32) == (type(other) is not nn.GELU)
        for name, value in (("_apply_gate", lambda x: x), ("has_bias", True)):
            before = getattr(module, name)
            setattr(module, name, value)
            assert not row_by_row(module, slot, torch.float32)
            setattr(module, name, before)
        del module._apply_gate
        assert row_by_row(module, slot, torch.float32)


@pytest.mark.parametrize("some", [False, True], ids=["codes", "some values"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("of", ["codes", "codes4"])
def test_in_any_company_the_same_bits(
    of: Any, dtype: str, some: bool, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)
    options: dict[str, Any] = {"dtype": dtype, "slots": of, "ram_budget": "100%"}
    with load(made("qwen3_moe", some=some), **options) as offloaded:
        module, slots = experts_of(offloaded)
        kind = getattr(torch, dtype)
        assert {row_by_row(module, slot, kind) for slot in slots} == {True, not some}
        rows = torch.randn(7, offloaded.model.config.hidden_size, dtype=kind)
        counts = [len(rows), 1, 2, 5]
        experts = [FewRows(i, slots[i], rows[:n]) for i, n in enumerate(counts)]
        outputs = few_rows_outputs(module, experts, kind, 3)
        for one, found in zip(experts, torch.split_with_sizes(outputs, counts), strict=True):
            assert torch.equal(found, expert_output(module, *one[:2], one.rows, kind))
            if row_by_row(module, one.slot, kind):
                by_row = [expert_output(module, *one[:2], row, kind) for row in one.rows[:, None]]
                assert torch.equal(torch.cat(by_row), found)


def test_where_a_gradient_is_wanted_outputs_are_the_same(made: Callable[..., Path]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "slots": "codes", "ram_budget": "100%"}
    with load(made("mixtral"), **options) as offloaded:
        module, (slot, *_) = experts_of(offloaded)
        rows = torch.randn(3, offloaded.model.config.hidden_size, requires_grad=True)
        found = []
        for compute_it in (expert_output, compute._by_operations):
            outputs = compute_it(module, 0, slot, rows, torch.float32)
            (gradient,) = torch.autograd.grad(outputs.square().sum(), rows)
            found.append((outputs, gradient))
        (outputs, gradient), (wanted, of_operations) = found
        assert (outputs - wanted).abs().max() < 1e-6
        assert torch.allclose(gradient, of_operations, rtol=1e-4, atol=1e-7)
        assert gradient.abs().max() > 0
        logits = offloaded.model(IDS).logits
        assert logits.requires_grad
        with torch.no_grad():
            assert torch.equal(expert_output(module, 0, slot, rows, torch.float32), outputs)
            assert torch.equal(offloaded.model(IDS).logits, logits)
