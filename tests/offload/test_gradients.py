"""Gradients through an offloaded model are those of the model with everything in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moebound.checkpoint import open_checkpoint
from moebound.offload.loading import load
from moebound.offload.slots import Slot, SlotKind, SlotPool
from moebound.store import compress, decompress
from moebound.types import ErrorBound
from tiny_models import make_tiny

IDS = torch.arange(5, 25).view(2, 10)


def gradients(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found
    for name, gradient in found.items():
        off = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
        assert off < 1e-4, f"{name}: {off:g}"


# Linear and transposed, with biases (which record a gradient whatever comes in), without gate.
@pytest.mark.parametrize("original", [True, False], ids=["one-by-one", "fused"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_slots_that_are_used_again_do_not_reach_backward(
    name: str, original: bool, tmp_path: Path
) -> None:
    src = make_tiny(name, tmp_path / "src", original_format=original)
    compress(open_checkpoint(src), tmp_path / "dst", bound=ErrorBound(0.3, "rate"))
    decompress(tmp_path / "dst", tmp_path / "out")
    expected = gradients(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    )
    # Decoded into slots, read into them, and out of RAM.
    ways: list[tuple[str, dict[str, Any]]] = [
        ("dst", {"ram_budget": "78%", "tier": "disk"}),
        ("out", {"ram_budget": "78%", "tier": "disk"}),
        ("dst", {"ram_budget": "105%", "tier": "ram"}),
    ]
    for source, options in ways:
        with load(tmp_path / source, dtype="float32", **options) as offloaded:
            for _ in range(2):
                assert_close(gradients(offloaded.model), expected)
            assert offloaded.stats()["evictions"] > 0


def test_a_pass_in_between_changes_no_gradient(store: Path) -> None:
    """One text, one token, and other texts computed before `backward` is called."""
    ids = IDS[:1, :1]
    expected = AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32)
    expected(ids).logits.square().sum().backward()
    with load(store, dtype="float32", ram_budget="60%", tier="disk") as offloaded:
        found = offloaded.model(ids).logits.square().sum()
        with torch.inference_mode():
            offloaded.model(IDS)
        found.backward()
        grads = {n: p.grad for n, p in offloaded.model.named_parameters() if p.grad is not None}
    assert_close(grads, {n: p.grad for n, p in expected.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("ids", [IDS, IDS[:1, :2], IDS[:2, :1]], ids=["20", "2", "1+1"])
def test_checkpointing_meets_the_same_operations_again(ids: torch.Tensor, store: Path) -> None:
    """Experts arrive in another order the second time, some with as many tokens as others."""
    expected = gradients(AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32), ids)
    with load(store, dtype="float32", ram_budget="60%", tier="disk") as offloaded:
        offloaded.model.train()
        offloaded.model.activation_checkpointing_enable()
        for _ in range(2):
            assert_close(gradients(offloaded.model, ids), expected)


def test_nothing_is_copied_where_no_gradient_is_recorded(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Slot] = []
    copy = Slot.copy

    def counted(slot: Slot) -> Slot:
        copied.append(slot)
        return copy(slot)

    monkeypatch.setattr(Slot, "copy", counted)
    with load(store, dtype="float32") as offloaded:
        with torch.no_grad():
            offloaded.model(IDS)
        assert not copied
        offloaded.model(IDS)
        assert copied
        copied.clear()
        offloaded.model.requires_grad_(False)
        offloaded.model(IDS)
        assert not copied


def test_slots_made_in_inference_mode_can_be_overwritten_outside() -> None:
    kind = SlotKind(
        (("up_proj", (2, 2)), ("down_proj", (2, 2))), torch.float32, False, False, False
    )
    with torch.inference_mode():
        slot = SlotPool(1 << 20, torch.device("cpu"), [kind]).take(kind)
    slot.down.copy_(torch.ones(2, 2))
