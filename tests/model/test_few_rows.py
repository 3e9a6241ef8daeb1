"""Linear layers of a few rows by the native product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from moebound import _native
from moebound.model import few_rows, joined
from moebound.model.few_rows import ROWS, NativeLinear, multiply_few_rows
from moebound.model.joined import JoinedLinears

pytestmark = pytest.mark.skipif(_native.isa() == "scalar", reason="no vector instructions")


@pytest.fixture(autouse=True)
def _small_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", 1000)
    monkeypatch.setattr(few_rows, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(joined, "LEAST_WEIGHTS", 1000)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(*, bias: bool = True) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 90, bias=bias), nn.Linear(90, 2)).bfloat16()
    assert multiply_few_rows(model) == 1  # the other one is too small
    assert multiply_few_rows(model) == 0  # once is enough
    return model


def exact(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ layer.weight.double().t() + bias


@pytest.mark.parametrize("bias", [True, False])
def test_a_row_is_the_same_whatever_is_beside_it(bias: bool) -> None:
    layer = made(bias=bias)[0]
    x = torch.randn(2, 4, 200, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = layer(x)
        assert whole.shape == (2, 4, 90)
        error = (whole.double() - exact(layer, x)).abs()
        assert (error <= exact(layer, x).abs() * 2**-8 + 1e-5).all()  # rounded once
        for threads in (1, 3):
            torch.set_num_threads(threads)
            alone = [layer(row.view(1, 1, -1)) for row in x.view(8, -1)]
            assert torch.equal(torch.cat(alone).view(2, 4, 90), whole)
        strided = torch.stack([x, x], -1)[..., 0]
        assert not strided.is_contiguous()
        assert torch.equal(layer(strided), whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_all_else_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    layer, forward = model[0], model[0].forward
    assert isinstance(forward, NativeLinear)
    few, many = (torch.randn(n, 200, dtype=torch.bfloat16) for n in (ROWS, ROWS + 1))
    products = list[int]()

    def product(_: NativeLinear, x: torch.Tensor) -> torch.Tensor:
        products.append(len(x))
        return x.new_zeros(len(x), 90)

    monkeypatch.setattr(NativeLinear, "product", product)
    with torch.no_grad():
        layer(few)
        assert products.pop() == ROWS
        for x in (many, few[:0]):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.float()
        x = few.float()
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer.bfloat16()
        traced = torch.jit.trace(layer, few, check_trace=False)  # type: ignore[no-untyped-call]
        assert torch.equal(traced(many), nn.functional.linear(many, layer.weight, layer.bias))
        assert torch.func.vmap(layer)(few).shape == (ROWS, 90)
        with pytest.raises(RuntimeError, match="shapes"):
            layer(few.view(-1, 100))
    assert not products


def test_other_weights_are_seen() -> None:
    layer = made()[0]
    x = torch.randn(1, 200, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert torch.equal(layer(x), 2 * before)
        layer.weight.data = layer.weight / 2
        layer.bias.data = layer.bias / 2
        assert torch.equal(layer(x), before)
        layer.weight = nn.Parameter(layer.weight * 2)
        layer.bias = None
        assert torch.allclose(layer(x).double(), exact(layer, x), atol=0.05)


def test_gradients() -> None:
    found = []
    for native in (True, False):
        model = made()
        if not native:
            del model[0].forward
        x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
        x.requires_grad_()
        out = model[0](x)
        out.float().square().sum().backward()
        with torch.no_grad():
            assert torch.equal(out, model[0](x))
        found.append([x.grad, *(p.grad for p in model[0].parameters())])
    for own, wanted in zip(*found, strict=True):
        assert torch.allclose(own.float(), wanted.float(), rtol=0.05, atol=0.05)


def test_strands_join_them_from_one_row_on() -> None:
    model = made()
    joining = JoinedLinears(model)
    try:
        assert len(joining) == 1
        joined_forward = model[0].forward
        assert joined_forward.args[2] == 1  # of so many rows at least
    finally:
        joining.remove()
    assert isinstance(model[0].forward, NativeLinear)
