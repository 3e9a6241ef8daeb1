"""Routers of a few rows by the native product: any number of rows alike, or as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from moebound import _native
from moebound.checkpoint.families import ROUTERS
from moebound.model.few_rows import ROWS
from moebound.model.native_routers import NativeRouter, route_few_rows
from tiny_models import tiny_model

pytestmark = pytest.mark.skipif(_native.isa() == "scalar", reason="no vector instructions")

WIDTH = 40


class Router(nn.Module):
    """As families have them, with whatever a test wants of it."""

    def __init__(self, n_experts: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_experts, WIDTH).bfloat16())
        self.e_bias = torch.linspace(0, 1, n_experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.view(-1, WIDTH)
        logits = nn.functional.linear(x.type(torch.float32), self.weight.type(torch.float32))
        scores = logits.sigmoid() + self.e_bias
        best = torch.topk(scores, k=4, dim=-1, sorted=False)[1]
        return logits, scores.gather(1, best), best


class Block(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router


def routed(router: Any, *, native: bool = True) -> Any:
    assert route_few_rows(Block(router)) == int(native)
    assert isinstance(vars(router).get("forward"), NativeRouter) == native
    return router


def rows(n: int) -> torch.Tensor:
    return torch.randn((n, WIDTH), generator=torch.Generator().manual_seed(n)).bfloat16()


def exact(router: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = x.double() @ router.weight.double().t()
    return found


@torch.no_grad()
def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    router = routed(Router())
    x = rows(ROWS)
    logits, weights, best = router(x)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), exact(router, x), atol=1e-4)
    for i in range(ROWS):
        for part, whole in zip(router(x[i : i + 1]), (logits, weights, best), strict=True):
            assert torch.equal(part, whole[i : i + 1])
    assert torch.equal(router(x[None])[0], logits)


@torch.no_grad()
def test_prompts_and_other_dtypes_are_torchs() -> None:
    router = routed(Router())
    for x in (rows(ROWS + 1), rows(2 * ROWS), rows(2).float()):
        for found, wanted in zip(router(x), Router.forward(router, x), strict=True):
            assert torch.equal(found, wanted)
    router.float()
    x = rows(3).float()
    assert torch.equal(router(x)[0], Router.forward(router, x)[0])


def test_gradients() -> None:
    found = []
    for native in (True, False):
        torch.manual_seed(0)
        router = Router()
        if native:
            routed(router)
        x = rows(3).requires_grad_()
        logits, weights, _ = router(x)
        (logits.square().sum() + weights.sum()).backward()
        if native:
            with torch.no_grad():
                assert torch.equal(router(x)[0], logits)
        found.append([x.grad, router.weight.grad])
    for own, wanted in zip(*found, strict=True):
        assert own.dtype == wanted.dtype == torch.bfloat16
        assert torch.allclose(own, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


class OtherWeights(Router):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (nn.functional.linear(x, self.weight * 2),)


class NoLinear(Router):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x @ self.weight.t(),)


class MeansOfAll(Router):
    """Whose rows depend on each other."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.linear(x, self.weight)
        return (logits - logits.mean(),)


class Tied(Router):
    """Whose weight is something else by the time that it is used."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (2 * nn.functional.linear(x.float(), torch.as_tensor(self.weight).float()),)


@pytest.mark.parametrize("kind", [OtherWeights, NoLinear, MeansOfAll, Tied])
def test_what_does_something_else_stays_as_it_was(kind: type[Router]) -> None:
    router = routed(kind(), native=False)
    x = rows(2)
    assert torch.equal(router(x)[0], kind.forward(router, x)[0])


def test_where_torchs_vectors_end_elsewhere_it_stays_as_it_was() -> None:
    """Of 60 experts a row ends within a vector, and its last numbers have another exponential."""
    x = rows(ROWS)
    router = Router(60)
    alone = torch.cat([router.forward(x[i : i + 1])[0].sigmoid() for i in range(ROWS)])
    together = torch.cat([router.forward(x[i : i + 1])[0] for i in range(ROWS)]).sigmoid()
    if torch.equal(alone, together):
        pytest.skip("this processor's sigmoid is the same everywhere")
    routed(router, native=False)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["mixtral", "gpt_oss", "deepseek_v3", "minimax_m2", "lfm2_moe", "qwen3_moe"]
)
def test_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        monkeypatch.setitem(tiny_models.SMALL, key, 32)
    model = tiny_model(name, dtype=torch.bfloat16, seed=0)
    text = torch.arange(5)[None] + 3
    wanted = model(input_ids=text).logits
    assert route_few_rows(model) > 0
    assert route_few_rows(model) == 0  # once is enough
    called = [m for key, m in model.named_modules() if key.rpartition(".")[2] in ROUTERS]
    assert all(isinstance(vars(m).get("forward"), NativeRouter) for m in called)
    found = model(input_ids=text).logits
    assert torch.allclose(found, wanted, atol=0.05 * float(wanted.abs().max()))
