"""What needs all experts of an offloaded model is done right, or says what to do instead."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError
from moebound.offload import whole
from moebound.offload.loading import load
from moebound.offload.offloaded import Offloaded
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny

IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    src = make_tiny(request.param, folder / "src")
    compress(open_checkpoint(src), folder / "dst", bound=ErrorBound(0.3, "rate"))
    return folder / "dst"


@pytest.fixture
def offloaded(store: Path) -> Iterator[Offloaded]:
    with load(store, ram_budget="60%", tier="disk") as found:
        yield found


@pytest.fixture(scope="module")
def stock(store: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(store)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


Act = Callable[[Any, Path], Any]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model, _: model.model.layers[0]._replicate_for_data_parallel(), "DataParallel: "),
        (lambda model, out: model.save_pretrained(out), "save_pretrained: .*moebound decompress"),
        (lambda model, out: model.model.save_pretrained(out), "save_pretrained: .*copy the store"),
        (lambda model, out: model.push_to_hub("me/it"), "push_to_hub: .*moebound decompress"),
        (lambda model, out: copy.deepcopy(model), "deepcopy: .*from_pretrained"),
        (lambda model, out: copy.deepcopy(model.model.layers[0]), "deepcopy: "),
        (lambda model, out: pickle.dumps(model), "pickle: .*moebound decompress"),
        (lambda model, out: torch.save(model, io.BytesIO()), "pickle: .*moebound decompress"),
        (lambda model, out: model.set_experts_implementation("eager"), "'moebound' alone"),
        (lambda model, out: model.to("meta"), r"to\('meta'\): .*stay on 'cpu'.*device='meta'"),
        (lambda model, out: model.model.layers[0].to_empty(device="meta"), "stay on 'cpu'"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written_or_changed(
    act: Act, message: str, offloaded: Offloaded, tmp_path: Path
) -> None:
    before = logits(offloaded.model)
    with pytest.raises(CacheError, match=message):
        act(offloaded.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(offloaded.model), before)


def test_numbers_of_parameters(offloaded: Offloaded, stock: Any) -> None:
    model = offloaded.model
    for options in ({}, {"exclude_embeddings": True}):
        assert model.num_parameters(**options) == stock.num_parameters(**options)
        assert model.model.num_parameters(**options) == stock.model.num_parameters(**options)
    trained = sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == trained < stock.num_parameters()


def test_memory_footprint_counts_decoded_experts(offloaded: Offloaded) -> None:
    logits(offloaded.model)
    plain = sum(t.nbytes for t in (*offloaded.model.parameters(), *offloaded.model.buffers()))
    assert offloaded.model.get_memory_footprint() == plain + offloaded.pool_bytes > plain


class TestStateDict:
    def test_has_all_experts(self, offloaded: Offloaded, stock: Any) -> None:
        found, expected = offloaded.model.state_dict(), stock.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        part = offloaded.model.model.layers[0].state_dict()
        assert part.keys() == stock.model.layers[0].state_dict().keys()

    def test_holds_no_slot(self, offloaded: Offloaded) -> None:
        before = offloaded.model.state_dict()
        kept = {name: tensor.clone() for name, tensor in before.items()}
        logits(offloaded.model)
        assert all(torch.equal(before[name], kept[name]) for name in kept)

    def test_without_memory_for_it(
        self, offloaded: Offloaded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(whole, "available_memory", lambda device: 1000)
        with pytest.raises(CacheError, match=r"take \d+ bytes decoded, and 1000 are free"):
            offloaded.model.state_dict()

    @pytest.mark.parametrize("strict", [True, False])
    def test_experts_cannot_be_loaded(self, strict: bool, offloaded: Offloaded, stock: Any) -> None:
        before = logits(offloaded.model)
        changed = {name: tensor + 1 for name, tensor in stock.state_dict().items()}
        with pytest.raises(CacheError, match=r"load_state_dict: 'model.*experts.*compress"):
            offloaded.model.load_state_dict(changed, strict=strict)
        assert torch.equal(logits(offloaded.model), before)

    def test_all_else_can_be_loaded(self, offloaded: Offloaded) -> None:
        plain = {name: tensor * 0 for name, tensor in offloaded.model.named_parameters()}
        offloaded.model.load_state_dict(plain, strict=False)
        assert not logits(offloaded.model).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cast_model_is_that_of_the_cast_weights(
    dtype: torch.dtype, offloaded: Offloaded, store: Path
) -> None:
    logits(offloaded.model)
    stock: Any = AutoModelForCausalLM.from_pretrained(store, experts_implementation="eager")
    expected = logits(stock.to(dtype))
    found = logits(offloaded.model.to(dtype))
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= 1e-5
    assert offloaded.model.state_dict()["lm_head.weight"].dtype == dtype
    assert {t.dtype for t in offloaded.model.state_dict().values() if t.is_floating_point()} == {
        dtype
    }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_keeps_no_experts_of_one_text(offloaded: Offloaded) -> None:
    experts = offloaded.model.model.layers[0].mlp
    x = torch.randn(1, 4, offloaded.model.config.hidden_size).to(offloaded.model.dtype)
    with torch.no_grad():
        before = experts(x)
        with pytest.raises(CacheError, match=r"torch\.jit\.trace: .*every other text"):
            torch.jit.trace(experts, x, check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(experts(x), before)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_transforms_are_refused_in_words(transform: Any, offloaded: Offloaded) -> None:
    module = offloaded.model.model.layers[0].mlp.experts
    chosen, weights = torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)

    def total(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module(x, chosen, weights).sum()
        return found

    x = torch.randn(4, offloaded.model.config.hidden_size)
    with pytest.raises(CacheError, match=r"torch\.func: .*backward"):
        transform(total)(x[None] if transform is torch.func.vmap else x)
