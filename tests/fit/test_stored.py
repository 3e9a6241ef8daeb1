"""`fit` of a store: its own bytes, and the budgets that load accepts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moebound.checkpoint import open_checkpoint
from moebound.cli.main import main
from moebound.codec import Encoded
from moebound.errors import CacheError
from moebound.fit import Machine, estimate_store, is_store, shape_of
from moebound.fit import shape as fit_shape
from moebound.fit.experts import kind_of, kinds_of
from moebound.fit.running import running
from moebound.model import few_rows
from moebound.model.code_linear import CodeLinear
from moebound.offload.codes import SLOTS, SlotsName, code_kinds, in_four_bits
from moebound.offload.entries import DiskMatrix, open_entries
from moebound.offload.loading import load
from moebound.store import compress
from moebound.store import others as store_others
from moebound.types import ErrorBound
from tiny_models import make_tiny

MACHINE = Machine("a processor", 2, {"values": 1e-3, "codes": 8e-4, "codes4": 6e-4}, 20e9, 1e9)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of its experts can be codes of four bits."""
    folder = tmp_path_factory.mktemp("olmoe")
    source = open_checkpoint(make_tiny("olmoe", folder / "src"))
    compress(source, folder / "dst", bound=ErrorBound(0.6, "rate"))
    return folder / "dst"


def test_its_bytes_are_counted(store: Path) -> None:
    assert is_store(store)
    assert not is_store(store.parent / "src")
    assert not is_store("OLMoE-1B-7B")
    _, found = estimate_store(store, shape_of(store), memory=2_000_000_000)
    entries = open_entries(store)
    assert found.rate is None
    assert found.expert_bytes == found.experts.all_bytes == entries.n_bytes
    assert found.model_bytes == sum(f.stat().st_size for f in store.glob("*.safetensors"))
    assert found.bits == 8 * entries.n_bytes / entries.n_weights
    assert found.fits is not None
    assert found.fits.where == "decoded"
    assert found.experts.device is not None
    assert [e.key for e in found.experts.device.experts] == sorted(  # type: ignore[attr-defined]
        (entry.key for entry in entries), key=lambda key: (key.expert, key.layer)
    )
    assert min(found.decode_s, found.codes_s, found.codes4_s) > 0


@pytest.mark.parametrize("slots", SLOTS)
def test_the_least_memory_is_the_least_that_load_takes(store: Path, slots: SlotsName) -> None:
    shape, sizes = estimate_store(store, shape_of(store))
    found = running(shape, sizes, slots, MACHINE, 0)
    spare = found.floor_bytes - sizes.experts.floor[slots]
    least = found.floor_bytes - spare
    with load(store, slots=slots, tier="disk", ram_budget=least) as offloaded:
        assert offloaded.choice.slots == slots
    with pytest.raises(CacheError, match=f"smallest budget is {least} bytes"):
        load(store, slots=slots, tier="disk", ram_budget=least - 1)


def test_where_no_expert_is_in_four_bits(tmp_path: Path) -> None:
    source = open_checkpoint(make_tiny("olmoe", tmp_path / "src"))
    compress(source, tmp_path / "dst", bound=ErrorBound(0.3, "rate"))
    shape, found = estimate_store(tmp_path / "dst", shape_of(tmp_path / "dst"))
    assert shape.codes
    assert list(found.experts.floor) == ["values", "codes"]
    assert found.codes4_s == 0


def test_an_expert_by_itself_lies_in_the_slots_that_load_gives_it(tmp_path: Path) -> None:
    source, seen = open_checkpoint(make_tiny("mixtral", tmp_path / "src")), set[tuple[str, ...]]()
    shape = shape_of(tmp_path / "src")
    gated = replace(kind_of(shape), gated=True)
    for rate in (0.05, 0.3, 0.4, 0.9):
        store = tmp_path / str(rate)
        compress(source, store, bound=ErrorBound(rate, "rate"))
        for entry in open_entries(store):
            codes = code_kinds([entry], {entry.key: gated}, torch.device("cpu"))
            kinds = {"values": gated, "codes": codes.kinds[entry.key]}
            kinds["codes4"] = in_four_bits([entry], codes).kinds[entry.key]
            expected = {slots: kind.n_bytes for slots, kind in kinds.items()}
            if not codes.any_codes:
                del expected["codes"]
            if kinds["codes4"].bits == 8:
                del expected["codes4"]
            by_itself = kinds_of(shape, list(map(_encoded, entry.matrices)))
            assert {slots: kind.n_bytes for slots, kind in by_itself.items()} == expected
            seen.add(tuple(expected))
    assert seen == {SLOTS[:number] for number in (1, 2, 3)}


def _encoded(part: DiskMatrix) -> Encoded:
    """A stored matrix as whoever encoded it had it."""
    assert part.stored is not None
    return Encoded(bytes(part.stored.read()), part.stored.record.certificate, np.empty(0))


def test_what_no_gpu_decodes(tmp_path: Path) -> None:
    source = open_checkpoint(make_tiny("mixtral", tmp_path / "src"))
    compress(source, tmp_path / "dst", bound=ErrorBound(0.3, "rate"), codec="raw")
    shape, found = estimate_store(tmp_path / "dst", shape_of(tmp_path / "dst"))
    assert found.experts.device is None
    assert not shape.codes
    assert set(found.experts.floor) == {"values"}


def test_the_command(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(store), "--ram", "2GB", "--json"]) == 0
    [model] = json.loads(capsys.readouterr().out)["models"]
    assert [rate["rate"] for rate in model["rates"]] == [None]
    assert model["rates"][0]["expert_bytes"] == open_entries(store).n_bytes
    assert [(way["stored"], way["slots"]) for way in model["running"]] == [
        (False, "values"), *((True, slots) for slots in SLOTS)]  # fmt: skip
    assert main(["fit", str(store), "--device", "2GB", "--device-speed", "1"]) == 0
    shown = capsys.readouterr().out
    assert "as stored" in shown
    assert "some of its own experts decoded here" in shown
    assert "random experts" not in shown
    for option in (["--rate", "0.3"], ["--steps"]):
        assert main(["fit", str(store), *option]) == 2
        assert "is a store, whose own bytes are counted" in capsys.readouterr().err


@pytest.mark.parametrize("linears", ["codes", "codes4"])
def test_linear_layers_are_what_load_makes_them(
    linears: SlotsName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (few_rows, store_others):
        monkeypatch.setattr(module, "LEAST_WEIGHTS", 512)
    source = open_checkpoint(make_tiny("deepseek_v3", tmp_path / "src"))
    compress(source, tmp_path / "dst", bound=ErrorBound(0.6, "rate"), others=0.9)
    _, found = estimate_store(tmp_path / "dst", shape_of(tmp_path / "dst"), linears=linears)
    with load(tmp_path / "dst", linears=linears) as offloaded:
        layers = [m for m in offloaded.model.modules() if isinstance(m, CodeLinear)]
    assert found.linears.n_weights == sum(layer.n_weights for layer in layers)
    monkeypatch.setattr(fit_shape, "LEAST_WEIGHTS", 512)
    assert shape_of(tmp_path / "src").n_linear == found.linears.n_weights
    assert found.linears.weights.keys() == offloaded.choice.linears.keys() - {"values"}
    aside = found.linears.n_bytes - sum(layer.n_bytes for layer in layers)
    assert 0 <= aside <= 1500 * len(layers)  # tables and patches at most
