"""What `fit --device` counts is what load takes; the CPU stands for a GPU, interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from few_steps import store_of_few_steps
from moebound.fit import Host, estimate_store, expert_of, known, measure_gpu, place, shape_of
from moebound.fit import gpu as fit_gpu
from moebound.offload import choose, costs, timing
from moebound.offload.costs import Speeds
from moebound.offload.loading import load


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of_few_steps(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize(("held", "rest"), [(6, None), (3, "disk"), (3, "ram")])
def test_it_counts_what_load_takes(
    store: Path, held: int, rest: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, sizes = estimate_store(store, shape_of(store))  # heads of all six are read
    monkeypatch.setattr(costs, "SAMPLE_BYTES", 0)
    monkeypatch.setattr(costs, "MIN_SAMPLES", 1)
    monkeypatch.setattr(choose, "measure_speeds", lambda *_: Speeds(1e9, 1e9, 1e-3, 1e-3))
    host = Host(ram=2_000_000_000 if rest == "ram" else 0, cores=2)
    monkeypatch.setattr(choose, "host_bytes", lambda: host.pinned)
    experts = sizes.experts
    assert experts.device is not None
    each = experts.largest + 15 + experts.device.beside
    wanted = experts.floor["values"] + held * each
    spare = shape.plain_bytes * shape.n_other_weights + 1_500_000_000
    found = place(shape, sizes, "device", known(link=None), spare + wanted, host)
    # Buffers are taken off before what the budget is divided into.
    found = place(
        shape, sizes, "device", known(link=None), spare + wanted + found.buffer_bytes, host
    )
    with load(store, tier="device", ram_budget=found.budget_bytes, threads=2) as offloaded:
        choice = offloaded.choice
    assert choice.on_device == round(found.compressed * experts.n_asked) == held
    assert choice.rest == rest == (found.rest if found.rest_bytes else None)
    # Padding that fit counts for each expert is there once, and goes to the cache.
    assert choice.cache_bytes + choice.held_bytes == found.budget_bytes
    assert 0 <= found.compressed_bytes - choice.held_bytes <= 512 * held
    assert choice.expected_hit_ratio == pytest.approx(found.decoded, abs=0.1)
    if rest != "disk":  # there it counts the host's buffers, too
        assert choice.buffer_bytes <= found.buffer_bytes
        assert (found.buffer_bytes > 0) == (rest == "ram")


@pytest.mark.long
def test_a_gpu_that_is_here_is_measured(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_COPIED", "_REPEATS"):
        monkeypatch.setattr(fit_gpu, name, 1)
    monkeypatch.setattr(fit_gpu, "TOGETHER", together := 2)
    monkeypatch.setattr(timing, "cache_bytes", lambda _: 1 << 12)
    shape = shape_of(store)
    found = measure_gpu(shape, expert_of(store), torch.device("cpu"))
    assert found.measured
    assert [n for n, _ in found.launch] == [1, together]
    assert list(found.decode) == [32]
    assert [n for n, _ in found.decode[32]] == [shape.expert_size, together * shape.expert_size]
    assert min(found.link, found.memory, found.parse_s, found.compute_s(1)) > 0
    assert found.miss_s(2, shape.expert_size, 32) > 0
    assert measure_gpu(shape, expert_of(store), torch.device("cpu"), link=7.0).link == 7.0
