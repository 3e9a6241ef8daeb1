"""Experts of real stores decoded by the kernels, several at a time, into the model's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moebound.checkpoint import open_checkpoint
from moebound.codec.device import Schedule
from moebound.errors import CorruptionError
from moebound.model.live import live_experts
from moebound.offload.costs import empty_slot
from moebound.offload.decoding import DeviceDecoder, room_for
from moebound.offload.delivery import Arrival
from moebound.offload.images import Image, open_images
from moebound.offload.meter import Load
from moebound.offload.slots import Kind, Slot, fill
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import SMALL, make_tiny

CPU = torch.device("cpu")
MANY = Schedule(together=32)


def read(image: Image) -> memoryview:
    data = memoryview(bytearray(image.n_bytes))
    image.read(data)
    return data


def arrival(image: Image, kind: Kind) -> Arrival:
    slot = empty_slot(kind, CPU)
    for weight in slot.weights.values():
        weight.fill_(-7)
    return Arrival(image, slot, Load(image.key, image.n_bytes, image.n_weights, False))


def expected(image: Image, kind: Kind) -> Slot:
    slot, data = empty_slot(kind, CPU), read(image)
    for part in image.parts:
        fill(slot, part, data[part.start : part.stop], threads=1)
    return slot


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gate and up as they are computed with; or transposed and interleaved. Matrices large enough
    for 32 lanes, in short segments: the interpreter takes a segment a row, and steps are slow."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("hidden_size", 256), ("intermediate_size", 160)):
            patch.setitem(SMALL, name, size)
        source = open_checkpoint(make_tiny(request.param, folder / "src"))
    compress(source, folder / "dst", bound=ErrorBound(0.3, "rate"), codec="bound:segment=1024")
    return folder


def kind_of(folder: Path, dtype: torch.dtype) -> Kind:
    model = AutoModelForCausalLM.from_pretrained(folder / "src")
    return Kind.of(next(iter(live_experts(model).modules.values())), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("held", [True, False])
def test_the_weights_the_cpu_decodes(store: Path, dtype: torch.dtype, held: bool) -> None:
    images, kind = list(open_images(store / "dst")), kind_of(store, dtype)
    known = [(image, read(image)) for image in images] if held else []
    decoder = DeviceDecoder(CPU, known, schedule=MANY)
    assert (decoder.device_bytes > 0) == held
    for some in (images[2:3], images[:3]):
        arriving = torch.zeros(room_for(3, max(i.n_bytes for i in images)), dtype=torch.uint8)
        coming = [(arrival(image, kind), read(image)) for image in some]
        decoder.decode(coming, arriving)
        for found, _ in coming:
            want = expected(found.image, kind)
            for name, weight in found.slot.weights.items():
                assert torch.equal(weight, want.weights[name])


@pytest.mark.parametrize("held", [True, False])
def test_damage_names_the_file(store: Path, held: bool) -> None:
    images, kind = list(open_images(store / "dst")), kind_of(store, torch.bfloat16)
    decoder = DeviceDecoder(CPU, [(i, read(i)) for i in images] if held else [], schedule=MANY)
    arriving = torch.zeros(room_for(2, max(i.n_bytes for i in images)), dtype=torch.uint8)
    spoilt = read(images[1])
    part = images[1].parts[0]
    at = part.stop - 40 if held else part.start + 60
    spoilt[at] ^= 4
    coming = [(arrival(images[0], kind), read(images[0])), (arrival(images[1], kind), spoilt)]
    with pytest.raises(CorruptionError, match=str(images[1].spans[0].file)):
        decoder.decode(coming, arriving)
    with pytest.raises(CorruptionError, match=str(images[1].spans[0].file)):
        DeviceDecoder(CPU, [(images[1], spoilt)])
