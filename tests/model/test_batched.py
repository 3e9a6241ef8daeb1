"""The batched experts are the model's own, whatever the family, and can be trained through."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moebound.model import batched
from moebound.model.batched import NAME, register_batched
from tiny_models import tiny_model

# Gated, transposed with biases, without a gate, with another activation, few and many per token.
FAMILIES = ["dots1", "qwen3_moe", "gpt_oss", "nemotron_h", "mixtral", "olmoe", "phimoe",
            "granitemoe"]  # fmt: skip


def logits(model: Any, implementation: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_batched()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("start", [0, 1 << 60], ids=["one by one", "together"])
def test_equal_to_the_models_own(name: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "START_WEIGHTS", start)
    model: Any = tiny_model(name, dtype=torch.float32)
    if not model._can_set_experts_implementation():
        pytest.skip(f"{name}: transformers lets nobody replace its experts")
    for shape in ((2, 9), (1, 1)):
        ids = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            ours, own = logits(model, NAME, ids), logits(model, "eager", ids)
        assert torch.isfinite(own).all()
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 1 << 60], ids=["one by one", "together"])
def test_gradients_are_the_models_own(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "START_WEIGHTS", start)
    model: Any = tiny_model("qwen3_moe", dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for implementation in (NAME, "eager"):
        model.zero_grad()
        loss: Any = logits(model, implementation, ids).float().logsumexp(-1).sum()
        loss.backward()
        found[implementation] = {
            key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None
        }
    assert found[NAME].keys() == found["eager"].keys()
    assert any("experts.down_proj" in key for key in found[NAME])
    for key, gradient in found[NAME].items():
        torch.testing.assert_close(gradient, found["eager"][key], atol=1e-4, rtol=1e-4)


def test_experts_that_nobody_chose_and_ties() -> None:
    model: Any = tiny_model("deepseek_v3", dtype=torch.float32)
    experts = model.model.layers[1].mlp.experts
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([[2, 0]] * 5)  # 1 and 3 by nobody
    weights = torch.full((5, 2), 0.5)
    with torch.inference_mode():
        model.set_experts_implementation("eager")
        own = experts(x, chosen, weights)
        torch.testing.assert_close(batched.batched_experts(experts, x, chosen, weights), own)
