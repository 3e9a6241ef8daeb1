"""Experts of real stores decoded by the kernels, several at a time, into the model's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moebound.checkpoint import open_checkpoint
from moebound.errors import CorruptionError
from moebound.model.live import live_experts
from moebound.offload.decoding import DeviceDecoder, room_for
from moebound.offload.delivery import Arrival
from moebound.offload.entries import DiskEntry, open_entries
from moebound.offload.meter import Load
from moebound.offload.slots import Slot, SlotKind, fill
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import SMALL, make_tiny

CPU = torch.device("cpu")


def read(entry: DiskEntry) -> memoryview:
    data = memoryview(bytearray(entry.n_bytes))
    entry.read(data)
    return data


def arrival(entry: DiskEntry, kind: SlotKind) -> Arrival:
    slot = kind.empty(CPU)
    for weight in slot.weights.values():
        weight.fill_(-7)
    return Arrival(entry, slot, Load(entry.key, entry.n_bytes, entry.n_weights, False))


def expected(entry: DiskEntry, kind: SlotKind) -> Slot:
    slot, data = kind.empty(CPU), read(entry)
    for part in entry.matrices:
        fill(slot, part, data[part.start : part.stop], threads=1)
    return slot


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate and up as they are computed with; or transposed and interleaved. Matrices just large
    enough for 32 lanes, in short segments: the interpreter takes 32 of them at a time, a segment a
    row, and steps are slow."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("hidden_size", 256), ("intermediate_size", 128)):
            patch.setitem(SMALL, name, size)
        source = open_checkpoint(make_tiny(request.param, folder / "src"))
    compress(source, folder / "dst", bound=ErrorBound(0.3, "rate"), codec="bound:segment=1024")
    return folder


def kind_of(folder: Path, dtype: torch.dtype) -> SlotKind:
    model = AutoModelForCausalLM.from_pretrained(folder / "src")
    return SlotKind.of(next(iter(live_experts(model).modules.values())), dtype)


@pytest.mark.parametrize(
    ("dtype", "held"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_the_weights_the_cpu_decodes(store: Path, dtype: torch.dtype, held: bool) -> None:
    entries, kind = list(open_entries(store / "dst")), kind_of(store, dtype)
    known = [(entry, read(entry)) for entry in entries] if held else []
    decoder = DeviceDecoder(CPU, known)
    assert (decoder.device_bytes > 0) == held
    for some in (entries[2:3], entries[:2]):
        arriving = torch.zeros(room_for(2, max(i.n_bytes for i in entries)), dtype=torch.uint8)
        coming = [(arrival(entry, kind), read(entry)) for entry in some]
        decoder.decode(coming, arriving)
        for found, _ in coming:
            want = expected(found.entry, kind)
            for name, weight in found.slot.weights.items():
                assert torch.equal(weight, want.weights[name])


@pytest.mark.parametrize("held", [True, False])
def test_damage_names_the_file(store: Path, held: bool) -> None:
    entries, kind = list(open_entries(store / "dst")), kind_of(store, torch.bfloat16)
    decoder = DeviceDecoder(CPU, [(i, read(i)) for i in entries] if held else [])
    arriving = torch.zeros(room_for(2, max(i.n_bytes for i in entries)), dtype=torch.uint8)
    spoilt = read(entries[1])
    part = entries[1].matrices[0]
    at = part.stop - 40 if held else part.start + 60
    spoilt[at] ^= 4
    coming = [(arrival(entries[0], kind), read(entries[0])), (arrival(entries[1], kind), spoilt)]
    with pytest.raises(CorruptionError, match=str(entries[1].spans[0].file)):
        decoder.decode(coming, arriving)
    with pytest.raises(CorruptionError, match=str(entries[1].spans[0].file)):
        DeviceDecoder(CPU, [(entries[1], spoilt)])
