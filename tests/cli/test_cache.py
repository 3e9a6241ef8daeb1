"""`moebound cache simulate`: tables and documents, sizes from a store, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.cache import Simulation, ZipfTrace
from moebound.store import open_store

from .conftest import Run

SMALL = "zipf:layers=2,experts=8,top_k=2,tokens=120,sequences=2,prompt=10"


def test_a_table(run: Run) -> None:
    ran = run("cache", "simulate", SMALL, "--budgets", "50%,100%", "--policies", "lru,greedy-dual")
    assert ran.code == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert ["policy", "50.0", "%", "100.0", "%"] in lines
    rows = {line[0]: line for line in lines if line}
    assert rows["limit"][3:5] == ["100.0", "%"]
    assert {"lru", "greedy-dual"} <= rows.keys()
    assert "hobbit" not in rows
    assert rows["lru"][5:] == rows["limit"][5:]  # everything fits: all are as good


def test_a_document(run: Run) -> None:
    ran = run("cache", "simulate", SMALL, "--expert-bytes", "1000", "--budgets", "8KB,0.01MiB",
              "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert (ran.document["trace"], ran.document["one_by_one"]) == (SMALL, False)
    found = Simulation.from_json(ran.document)
    assert found.budgets == (8000, 10485)
    assert found.expert_bytes == 16000
    assert ran.document["best"]["8000"] == found.best(8000).policy


def test_sizes_from_a_store(run: Run, store: Path, tmp_path: Path) -> None:
    experts = [expert for expert in open_store(store).experts() if not expert.key.shared]
    drawn = ZipfTrace(layers=1, experts=len(experts), top_k=2, tokens=80, sequences=1, prompt=5)
    drawn.draw().save(tmp_path / "trace.npz")
    ran = run("cache", "simulate", tmp_path / "trace.npz", "--store", store, "--held", "encoded",
              "--json")  # fmt: skip
    assert ran.code == 0, ran.stderr
    assert ran.document["expert_bytes"] == sum(expert.n_bytes for expert in experts)
    assert {limit["kind"] for limit in ran.document["limits"]} == {"space-time"}
    table = run("cache", "simulate", tmp_path / "trace.npz", "--store", store)
    assert "Belady's optimum" in table.stdout  # decoded, they are all of one size


def test_one_by_one(run: Run) -> None:
    options = ["cache", "simulate", SMALL, "--budgets", "50%", "--policies", "lru", "--json"]
    apart = run(*options, "--one-by-one")
    assert apart.document["one_by_one"] is True
    assert apart.document["replays"] == run(*options).document["replays"]  # it has no batches


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["/nowhere.npz"], "/nowhere.npz: cannot be read"),
        (["zipf:token=3"], "'token' is none of"),
        ([SMALL, "--budgets", "10"], "needs sizes: give --store or --expert-bytes"),
        ([SMALL, "--budgets", "ten%"], "'ten%' is no budget"),
        ([SMALL, "--budgets", "120%"], "'120%' is no budget"),
        ([SMALL, "--budgets", "0%"], "'0%' is no budget"),
        ([SMALL, "--budgets", "1%"], "the smallest budget is 4000 bytes (25.0 %"),
        ([SMALL, "--policies", "lru,mru"], "'mru' is no policy: expected lru, lfu"),
        ([SMALL, "--held", "encoded"], "--held goes with --store"),
        ([SMALL, "--store", ".", "--expert-bytes", "5"], "give one of them"),
        ([SMALL, "--store", "."], "this is no store"),
    ],
)
def test_bad_input(run: Run, args: list[str], message: str) -> None:
    ran = run("cache", "simulate", *args)
    assert ran.code == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
