"""What is timed at load is timed with weights that come from memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moebound.offload import timing
from moebound.offload.slots import Slot, SlotKind
from moebound.offload.timing import (
    Between,
    Turns,
    cache_bytes,
    linear_layers,
    measure_turns,
    read_weights,
)

CPU = torch.device("cpu")
KIND = SlotKind(
    (("gate_up_proj", (4, 3)), ("down_proj", (3, 2))), torch.float32, True, False, False
)


def layers(*sides: tuple[int, int]) -> list[nn.Linear]:
    return [nn.Linear(n_in, n_out, bias=False) for n_in, n_out in sides]


def test_all_else_is_read_before_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the expert would still be in the processor's cache. Of each product the least counts: one
    that was held up says nothing about the others."""
    events = list[str]()
    between = Between(layers((8, 8), (8, 8)), CPU, torch.float32, all_bytes=512)
    assert between.n_bytes == 512
    reads = iter([[0.1, 0.1], [4.0, 7.0], [2.0, 9.0], [3.0, 5.0]])

    def read() -> list[float]:
        events.append("read")
        return next(reads)

    monkeypatch.setattr(between, "read", read)
    project = Slot.project

    def projects(self: Slot, name: str, x: torch.Tensor) -> torch.Tensor:
        events.append(f"{name} {self.kind.dtype}")
        return project(self, name, x)

    monkeypatch.setattr(Slot, "project", projects)
    half = replace(KIND, dtype=torch.float16)
    took = iter([0.0, 0.0, 0.0, 0.0, *[7.0, 0.5, 1.0, 4.0], *[0.25, 8.0, 3.0, 2.0], *[9.0] * 4])
    now = [0.0]

    def clock() -> float:
        # Three looks at each expert: before, between and behind its products.
        now.append(now[-1] + (next(took) if len(now) % 3 != 1 else 0.0))
        return now[-1]

    monkeypatch.setattr(timing, "clock", clock)
    found = measure_turns([KIND, half, KIND], between, 3)
    assert found.compute_s == {KIND: 0.25 + 0.5, half: 1.0 + 2.0}
    assert found.byte_s == (2.0 + 5.0) / 512
    each = [f"{name} {kind.dtype}" for kind in (KIND, half) for name, _ in kind.shapes]
    assert events == ["read", *each] * 4


def test_it_is_more_than_the_cache_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 1 << 20)
    some = layers(*[(256, 256)] * 40)  # 256 KiB each
    between = Between(some, CPU, torch.float32)
    assert between.n_bytes == 2 << 20
    chosen = [some.index(layer) for layer in between._layers]
    assert chosen == [5 * i for i in range(8)]  # spread over the model
    too_few = Between(some[:3], CPU, torch.float32)
    assert too_few.n_bytes >= 2 << 20
    assert too_few._layers[:3] == some[:3]
    # One that alone takes too long to read is left out, and weights on another device are.
    odd = [*layers((1024, 1024)), nn.Linear(256, 256, device="meta")]
    assert not set(Between(odd, CPU, torch.float32)._layers) & set(odd)


def test_what_fits_into_the_cache_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model's experts do not come from memory."""
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 1 << 30)
    assert Between([], CPU, torch.float32, all_bytes=50_000).n_bytes < 60_000
    assert Between([], CPU, torch.float32).n_bytes >= timing.MOST_BETWEEN


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_is_read_where_it_is_multiplied_by(tied: bool) -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    model.norm = nn.LayerNorm(4)
    if tied:
        model.head.weight = model.embed.weight
    assert read_weights(model) == 40 + 8
    assert linear_layers(model) == [model.head]


def test_the_largest_cache_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CACHES", tmp_path)
    assert cache_bytes(CPU) == timing.CACHE_BYTES  # nothing is said
    for index, size in enumerate(("48K", "2048K", "unknown")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cache_bytes(CPU) == 2 << 20


def test_a_load_measures_by_its_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebound.offload import choose
    from moebound.offload.loading import load
    from tiny_models import make_tiny

    seen = list[Any]()

    def turns(kinds: Any, between: Between) -> Turns:
        seen.append(between)
        return measure_turns(kinds, between)

    monkeypatch.setattr(choose, "measure_turns", turns)
    src = make_tiny("mixtral", tmp_path / "src")
    with load(src, ram_budget="100%", dtype="float32") as offloaded:
        own = set(linear_layers(offloaded.model))
        assert set(seen[0]._layers) & own
        assert offloaded.choice.costs.other_s > timing.LAYER_S
