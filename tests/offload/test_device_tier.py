"""Tier "device" without a GPU: who is refused, what is planned. With one: the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.checkpoint import open_checkpoint
from moebound.errors import CacheError
from moebound.offload import choose
from moebound.offload.costs import Costs, Speeds
from moebound.offload.decoding import room_for
from moebound.offload.device_tier import candidates
from moebound.offload.entries import open_entries
from moebound.offload.loading import load
from moebound.offload.split import first_fitting
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import SMALL, make_tiny

IDS = torch.arange(5, 25).view(2, 10)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_cpu_is_refused_by_name_and_auto_does_not_try_it(store: Path) -> None:
    with pytest.raises(
        CacheError, match=r"tier 'device': .* device 'cpu' has none: use tier='ram'"
    ):
        load(store, tier="device")
    with load(store) as offloaded:
        assert not any("device" in name for name in offloaded.choice.predicted_s)


def test_candidates_are_what_a_device_decodes_spread_over_layers(
    store: Path, tmp_path: Path
) -> None:
    entries = open_entries(store)
    found = candidates(entries)
    assert len(found) == len(list(entries))
    assert [entry.key.layer for entry in found[:4]] == [0, 1, 0, 1]
    room = [room_for(1, entry.n_bytes) + 100 for entry in found]
    assert first_fitting(found, sum(room[:3]), 100) == found[:3]
    assert first_fitting(found, sum(room[:3]) - 1, 100) == found[:2]
    src = make_tiny("mixtral", tmp_path / "src")
    assert candidates(open_entries(src)) == []
    compress(open_checkpoint(src), tmp_path / "dst", bound=ErrorBound(0.3, "rate"), codec="raw")
    assert candidates(open_entries(tmp_path / "dst")) == []


def test_a_part_on_the_host_costs_its_part() -> None:
    here, there = Speeds(None, 9e9, 0.0, 1e-3), Speeds(5e9, 7e9, 4e-3, 2e-3)
    mixed = here.mixed(there, 0.75)
    assert mixed == Speeds(5e9, 9e9, 1e-3, 1.25e-3)

    def seconds(speeds: Speeds) -> float:
        return Costs(speeds.read_s, speeds.decode_s, 0.0, 0.0, 1, 4).overlapped_s(0.5)

    assert seconds(here) < seconds(mixed) < seconds(there)


@pytest.mark.parametrize(("bus_s", "tier"), [(1e-2, "device"), (1e-6, "disk")])
def test_auto_takes_it_where_the_bus_costs_more_than_the_hits(
    store: Path, bus_s: float, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = open_entries(store)
    auto = choose._tiers("auto", entries, torch.device("cuda"))
    assert auto == ("disk", "ram", "device")
    assert choose._tiers("auto", entries, torch.device("cpu")) == ("disk", "ram")
    there, host = Speeds(None, 1e9, 0.0, 1e-3), Speeds(1e9, 1e9, bus_s, 1e-3)

    def plan(*args: Any, **_: Any) -> choose.DevicePlan:
        budget, floor = args[3:]
        held = sum(room_for(1, entry.n_bytes) for entry in entries)
        return choose.DevicePlan(budget, budget - floor, held, 0, there)

    monkeypatch.setattr(choose, "_tiers", lambda *_: auto)
    monkeypatch.setattr(choose, "plan_device", plan)
    monkeypatch.setattr(choose, "measure_speeds", lambda *_: host)
    with load(store, tier="disk") as offloaded:
        kinds, model = offloaded._fetcher.loader._kinds, offloaded.model
    best, *others = choose.choose(
        {"compressed": entries}, kinds, model, ways={"values": kinds},
        budget="90%", tier="auto", device=torch.device("cpu"), cores=1, drop_cache=False,
    )  # fmt: skip
    assert best.tier == tier
    assert {tier, *(other.tier for other in others)} >= {"disk", "device"}
    path = next(path for path in (best, *others) if path.tier == "device")
    assert path.cache_bytes + path.held_bytes <= 0.9 * sum(k.n_bytes for k in kinds.values())


@needs_gpu
def test_the_same_logits_on_a_gpu_whatever_the_tier_and_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("hidden_size", 256), ("intermediate_size", 160)):
        monkeypatch.setitem(SMALL, name, size)
    src = make_tiny("mixtral", tmp_path / "src")
    store = tmp_path / "dst"
    compress(open_checkpoint(src), store, bound=ErrorBound(0.3, "rate"), codec="bound:segment=1024")
    entries = open_entries(store)
    decoded = 2 * entries.n_weights
    found: list[torch.Tensor] = []
    with load(store, device="cuda", tier="ram", ram_budget="100%") as offloaded:
        found.append(_logits(offloaded.model))
    # Matrices so small take several times their bytes in tables.
    whole = decoded + 8 * entries.n_bytes
    for budget in (whole, whole - decoded // 2, decoded // 2 + 2 * entries.n_bytes):
        with load(store, device="cuda", tier="device", ram_budget=budget) as offloaded:
            found += [_logits(offloaded.model), _logits(offloaded.model)]
            choice, stats = offloaded.choice, offloaded.stats()
            assert choice.on_device > 0
            assert choice.held_bytes + choice.cache_bytes <= budget
            assert stats["tiers"]["device"] > 0
            if choice.rest is None:
                assert stats["bytes_moved"] == 0
    with load(store, device="cuda", ram_budget=whole) as offloaded:
        assert {name.split(", ")[1] for name in offloaded.choice.predicted_s} == {
            "disk", "ram", "device",
        }  # fmt: skip
        found.append(_logits(offloaded.model))
    assert all(torch.equal(some, found[0]) for some in found)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(IDS.to("cuda")).logits).cpu()
