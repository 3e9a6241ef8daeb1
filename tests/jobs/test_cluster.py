"""Two machines, one of them lost in the middle: the bytes are those of one process.

The machines are Ray nodes on this one, with room for a worker each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound import store
from moebound.bench import methods
from moebound.calibrate import Settings, collect, of_task
from moebound.calibrate.collect import reader
from moebound.errors import MoeboundError
from moebound.evaluate.loading import Loaded, load
from moebound.jobs.cluster import LOSSES, RayWorkers
from moebound.jobs.workers import Opening, Opens, Processes
from moebound.model import live_experts
from moebound.model.fingerprint import of_corners
from moebound.sensitivity.map.build import Build
from moebound.sensitivity.map.parts import parts
from moebound.sensitivity.map.settings import MapSettings
from moebound.tasks import get_task
from moebound.types import ErrorBound

SRC, TASK = "builtin:wordmath", "wordmath"
TIMES = ("predicted_in_s", "measured_in_s", "naive_s_each", "speedup_vs_naive",
         "sweep_speedup_vs_naive")  # fmt: skip


class Machines:
    """A head and a second node; `lose` kills the second, once."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._second = cluster.add_node(num_cpus=1)
        self.lost = 0

    def hire(self, setup: Opens) -> RayWorkers:
        machines = self

        class Watched(RayWorkers):
            def _gone(self, worker: Any) -> None:
                machines.lost += 1
                super()._gone(worker)

        ray = importlib.import_module("ray")
        found = Watched(setup.with_threads(1), 2, self._cluster.address)
        known: dict[str, Any] = {"ties": [], "answers": None, "drafts": None}
        # Both are at work when the first thing is finished, and one is lost then.
        opened = [worker.call.remote("use", (known,)) for worker in found._grow(2)]
        ray.get(opened)
        return found

    def lose(self) -> None:
        if self._second is not None:
            self._cluster.remove_node(self._second, allow_graceful=False)
            self._second = None


@pytest.fixture
def machines() -> Iterator[Machines]:
    ray = pytest.importorskip("ray", reason="pip install '.[ray]'")
    cluster_utils = importlib.import_module("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield Machines(cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def loaded() -> Iterator[Loaded]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(SRC)
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compressed(dst: Path, **options: Any) -> dict[str, bytes]:
    bound = ErrorBound(0.3, "rate", "expert")
    store.compress(SRC, dst, bound=bound, shard_bytes=1_500_000, **options)
    return contents(dst)


@pytest.mark.slow
def test_stores(machines: Machines, tmp_path: Path) -> None:
    one = compressed(tmp_path / "one")
    assert len(one) > 15
    two = compressed(tmp_path / "two", workers=machines.hire, progress=lambda _: machines.lose())
    assert machines.lost
    assert two == one


@pytest.mark.long
def test_statistics(machines: Machines, loaded: Loaded, tmp_path: Path) -> None:
    text, settings = of_task(loaded, get_task(TASK), 8), Settings(memory=1 << 20)
    collect(loaded, text, tmp_path / "one", settings)
    setup = Opening(reader, {
        "src": SRC, "dtype": "float32", "device": "cpu", "text": text, "out": tmp_path / "two",
        "settings": settings, "edited_by": None,
        "fingerprint": of_corners(live_experts(loaded.model)),
    })  # fmt: skip
    with machines.hire(setup) as workers:
        collect(loaded, text, tmp_path / "two", settings, lambda *_: machines.lose(), workers)
    assert machines.lost
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.long
def test_maps(machines: Machines, loaded: Loaded, tmp_path: Path) -> None:
    settings = MapSettings(rates=(0.3,), n_sampled=4, n_ties=4)

    def make(name: str, say: Callable[..., None] = lambda *_: None) -> Build:
        return Build.of(loaded, get_task(TASK), 3, settings, tmp_path / name, say)

    make("one").run()
    two = make("two", lambda what, *_: machines.lose() if what.startswith("layer") else None)
    setup = Opening(parts, {
        "src": SRC, "task": TASK, "limit": 3, "skip": 0, "tokens": "all", "settings": settings,
        "weights": two.weights,
    })  # fmt: skip
    with machines.hire(setup) as workers:
        two.run(workers)
    assert machines.lost
    found = []
    for name in ("one", "two"):
        document = json.loads((tmp_path / name).read_bytes())
        for time in TIMES:
            del document["checks"][time]
        found.append(document)
    assert found[0] == found[1]


@pytest.mark.long
def test_rows_of_methods(machines: Machines, loaded: Loaded, tmp_path: Path) -> None:
    del loaded  # one thread
    asked: dict[str, Any] = {"methods": ["bound", "rtn", "reap_re"], "bits": [4.0, 3.0],
                             "bases": ["svd:r0"], "limit": 2}  # fmt: skip
    one = methods.run(SRC, get_task(TASK), **asked).to_json()

    def say(what: str, done: int, total: int) -> None:
        del total
        if done:
            machines.lose()

    asked |= {"rows": tmp_path, "workers": machines.hire, "say": say}
    two = methods.run(SRC, get_task(TASK), **asked).to_json()
    assert machines.lost
    for document in (one, two):
        del document["environment"]
        for row in document["rows"]:
            for took in ("seconds", "cpu_seconds", "peak_bytes", "base_bytes"):
                row.pop(took, None)
    assert sum(row["reached"] for row in one["rows"]) >= 3
    assert two == one


class Dies:
    def __init__(self, threads: int | None) -> None:
        del threads

    def use(self, known: Any) -> None:
        del known

    def run(self, item: int) -> int:
        if item == 2:
            os._exit(9)
        return item


@pytest.mark.slow
def test_work_that_kills_its_workers_is_given_up(machines: Machines) -> None:
    cloudpickle = importlib.import_module("ray.cloudpickle")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see tests
    with machines.hire(Opening(Dies, {})) as workers, pytest.raises(MoeboundError, match="memory"):
        list(workers.run([1, 2, 3], {}))
    assert machines.lost == LOSSES + 1


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_processes_write_the_same_store(tmp_path: Path) -> None:
    one = compressed(tmp_path / "one")
    assert compressed(tmp_path / "two", workers=lambda setup: Processes(setup, 2)) == one


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_worker_that_finds_another_model_is_told(loaded: Loaded, tmp_path: Path) -> None:
    text, settings = of_task(loaded, get_task(TASK), 2), Settings(memory=1 << 20)
    setup = Opening(reader, {
        "src": "builtin:wordmath-mixtral", "dtype": "float32", "device": "cpu", "text": text,
        "out": tmp_path / "out", "settings": settings, "edited_by": None,
        "fingerprint": of_corners(live_experts(loaded.model)),
    })  # fmt: skip
    with Processes(setup, 1) as workers, pytest.raises(MoeboundError, match="other weights"):
        collect(loaded, text, tmp_path / "out", settings, workers=workers)
