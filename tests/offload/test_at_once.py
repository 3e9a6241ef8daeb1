"""Misses by one native call a matrix: the same bits as by the reference, and damage is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moebound.checkpoint import open_checkpoint
from moebound.errors import CorruptionError
from moebound.offload.fetcher import Fetcher
from moebound.offload.loading import load
from moebound.store import compress, open_store
from moebound.store import reader as store_reader
from moebound.store import stored as store_stored
from moebound.types import ErrorBound, ExpertKey
from tiny_models import make_tiny

IDS = torch.arange(5, 25).view(2, 10)
KEY = ExpertKey(1, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("at-once")
    compress(
        open_checkpoint(make_tiny("mixtral", folder / "src")),
        folder / "store",
        bound=ErrorBound(0.3, "rate"),
    )
    return folder / "store"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("slots", ["values", "codes"])
def test_the_bits_of_the_reference(
    slots: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise AssertionError("taken apart in Python")

    def ways() -> list[torch.Tensor]:
        found = list[torch.Tensor]()
        for tier, threads, drop_cache in (("disk", 1, False), ("disk", 3, True), ("ram", 2, False)):
            budget = "60%" if tier == "disk" else "150%"
            with load(
                store, ram_budget=budget, tier=tier, slots=slots, threads=threads,  # type: ignore[arg-type]
                drop_cache=drop_cache,
            ) as offloaded:  # fmt: skip
                found += [logits(offloaded.model), logits(offloaded.model)]
        return found

    with monkeypatch.context() as patched:
        patched.setattr(store_reader, "parse_certified", none)
        at_once = ways()
    with monkeypatch.context() as patched:
        patched.setattr(store_reader, "decode_certified", lambda *_: False)
        patched.setattr(store_stored, "codes_at_once", lambda *_, **__: None)
        reference = ways()
    assert all(torch.equal(one, at_once[0]) for one in (*at_once, *reference))


def spoil(store: Path) -> Callable[[], None]:
    """One bit of the expert's last matrix, near its end. Call what comes back to mend it."""
    expert = open_store(store).expert(KEY)
    at = expert.offset + expert.n_bytes - 9

    def flip() -> None:
        with open(expert.file, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))

    flip()
    return flip


@pytest.mark.parametrize("drop_cache", [False, True])
@pytest.mark.parametrize("slots", ["values", "codes"])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_damaged_last_matrix_is_refused_before_use(
    hashed: bool,
    slots: Any,
    drop_cache: bool,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At first use the hash of its certificate tells, later the checksum of its envelope alone."""
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    last = open_store(copy).expert(KEY).matrices[-1].tensor.name
    computed = list[ExpertKey]()
    real: Any = Fetcher.visit

    def visit(self: Fetcher, layer: int, first: int, *rest: Any, **options: Any) -> None:
        *others, compute = rest

        def noted(ready: Any, threads: int) -> None:
            computed.extend(ExpertKey(layer, first + number) for number in ready)
            compute(ready, threads)

        real(self, layer, first, *others, noted, **options)

    monkeypatch.setattr(Fetcher, "visit", visit)
    with load(copy, ram_budget="60%", tier="disk", slots=slots, drop_cache=drop_cache) as offloaded:
        mend = spoil(copy)
        if not hashed:
            monkeypatch.setenv("MOEBOUND_CHECK", "0")
        what = "expected SHA-256" if hashed else "checksum does not match"
        with pytest.raises(CorruptionError, match=f"layer 1 expert 2: .*{last}.*{what}"):
            logits(offloaded.model)
        assert computed
        assert KEY not in computed
        mend()
        again = logits(offloaded.model)
        assert KEY in computed
    monkeypatch.delenv("MOEBOUND_CHECK", raising=False)
    with load(store, slots=slots) as whole:
        assert torch.equal(again, logits(whole.model))
