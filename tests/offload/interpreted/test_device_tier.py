"""Experts compressed in a device's memory; the CPU stands for it, under triton's interpreter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from few_steps import store_of_few_steps
from moebound.cli.offload import choice_lines, stats_facts
from moebound.errors import CacheError, CorruptionError
from moebound.offload import choose, costs
from moebound.offload.costs import Speeds
from moebound.offload.delivery import Arrival
from moebound.offload.device_tier import DeviceTier, candidates
from moebound.offload.entries import open_entries
from moebound.offload.loading import load
from moebound.offload.meter import Load
from moebound.offload.slots import SlotKind
from moebound.offload.tiers import RamTier

CPU = torch.device("cpu")
IDS = torch.tensor([[5]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter is slow. Matrices of 32 lanes are in test_decoding.py."""
    return store_of_few_steps(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SAMPLE_BYTES", 0)
    monkeypatch.setattr(costs, "MIN_SAMPLES", 1)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of nothing that was decoded."""
    monkeypatch.setattr(choose, "measure_speeds", lambda *_: Speeds(1e9, 1e9, 1e-3, 1e-3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture(scope="module")
def expected(store: Path) -> torch.Tensor:
    with load(store, tier="ram", ram_budget="100%") as offloaded:
        return logits(offloaded.model)


def make(store: Path, **options: Any) -> DeviceTier:
    entries = open_entries(store)
    options = {"limit": choose.NO_LIMIT, "beside": 0, "host_bytes": 0} | options
    return DeviceTier(entries, candidates(entries), CPU, cores=2, drop_cache=False, **options)


@pytest.fixture(scope="module")
def whole(store: Path) -> DeviceTier:
    return make(store)


@pytest.mark.parametrize(("held", "rest"), [(6, None), (3, "disk")])
def test_the_same_logits_however_many_are_held(
    store: Path,
    whole: DeviceTier,
    expected: torch.Tensor,
    held: int,
    rest: str | None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if rest is not None:
        request.getfixturevalue("unmeasured")
    entries = open_entries(store)
    each = max(entry.n_bytes for entry in entries) + 15 + whole.most_beside
    decoded = 2 * entries.n_weights // len(list(entries))
    # Three of a layer at work and one kept in the other; and so many compressed.
    budget = 4 * decoded + held * each
    if rest == "disk":
        monkeypatch.setattr(choose, "host_bytes", lambda: 0)
    with load(store, tier="device", ram_budget=budget) as offloaded:
        assert torch.equal(logits(offloaded.model), expected)
        stats, choice = offloaded.stats(), offloaded.choice
        assert (choice.tier, choice.on_device, choice.rest) == ("device", held, rest)
        assert choice.held_bytes + choice.cache_bytes <= budget
        assert offloaded.pool_bytes <= choice.cache_bytes
        tiers = stats["tiers"]
        assert set(tiers) == {"decoded", "device", *([rest] if rest else [])}
        assert all(tiers[name] > 0 for name in tiers if name != "decoded")
        assert (stats["bytes_moved"] > 0) == (rest is not None)
        assert (choice.speeds.link is None) == (rest is None)
        said = choice_lines(offloaded)
        assert f"{held} compressed in the GPU's memory" in said[0]
        assert ("the others on disk" in said[0]) == (rest == "disk")
        assert ("reading" in said[2]) == (rest is not None)
        assert "% device" in dict(stats_facts(stats))["experts asked for"]


def test_what_is_held_is_spread_over_layers_and_within_the_limit(
    store: Path, whole: DeviceTier
) -> None:
    """Also where experts take more beside their bytes than was expected."""
    assert len(whole.keys) == 6
    limit = whole.held_bytes // 2
    tier = make(store, limit=limit, beside=0, host_bytes=1 << 40)
    assert 2 <= len(tier.keys) < 6
    assert tier.held_bytes <= limit
    assert {key.layer for key in tier.keys} == {0, 1}
    assert isinstance(tier.rest, RamTier)
    assert tier.rest.held_bytes == sum(
        e.n_bytes for e in open_entries(store) if e.key not in tier.keys
    )


def test_damage_before_and_after_it_is_on_the_device(
    store: Path, whole: DeviceTier, tmp_path: Path
) -> None:
    entry = next(iter(open_entries(store)))
    kind = SlotKind(
        (("gate_up_proj", (64, 32)), ("down_proj", (32, 32))),
        torch.bfloat16,
        True,
        False,
        False,
    )
    arrival = Arrival(entry, kind.empty(CPU), Load(entry.key, 0, entry.n_weights, False))
    end = whole._offsets[entry.key] + entry.matrices[0].stop
    spoilt = whole._compressed[end - 40 : end - 8]  # states and words
    spoilt ^= 4
    try:
        with pytest.raises(CorruptionError, match=str(entry.spans[0].file)):
            whole.launch([arrival]).finish()
    finally:
        spoilt ^= 4

    shutil.copytree(store, tmp_path / "dst")
    entry = next(iter(open_entries(tmp_path / "dst")))
    with open(entry.spans[0].file, "r+b") as file:
        file.seek(entry.spans[0].offset + entry.n_bytes - 40)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    with pytest.raises(CorruptionError, match=str(entry.spans[0].file)):
        make(tmp_path / "dst")


@pytest.mark.usefixtures("unmeasured")
def test_what_does_not_fit(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CacheError, match="beside one expert as it is on disk; the smallest"
    ) as said:
        load(store, tier="device", ram_budget=1000)
    least = int(str(said.value).split("smallest budget is ")[1].split()[0])
    with pytest.raises(CacheError, match="too small"):
        load(store, tier="device", ram_budget=least - 1)
    with load(store, tier="device", ram_budget=least) as offloaded:
        assert offloaded.choice.on_device == 1
    monkeypatch.setattr(choose, "available_memory", lambda _: least - 1)
    with pytest.raises(CacheError, match=r"where \d+ are free: give a ram_budget of \d+ bytes"):
        load(store, tier="device", ram_budget=least)
