"""Delivery to a GPU, as far as there need be none: how many threads, how much memory."""

from __future__ import annotations

import pytest
import torch

from moebound.checkpoint import open_checkpoint
from moebound.offload import cuda
from moebound.offload.cuda import CudaDelivery
from moebound.offload.decoding import room_for
from moebound.offload.images import Images, open_images
from moebound.offload.tiers import DiskTier, RamTier
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("mixtral")
    source = open_checkpoint(make_tiny("mixtral", folder / "src"))
    compress(source, folder / "dst", bound=ErrorBound(0.3, "rate"))
    return open_images(folder / "dst")


def test_out_of_ram_many_come_together_and_nothing_is_buffered_on_the_host(images: Images) -> None:
    largest = max(image.n_bytes for image in images)
    delivery = CudaDelivery(RamTier(images), CPU, largest=largest, cores=16, decode_on_device=True)
    assert (delivery.together, delivery.threads) == (cuda.TOGETHER, 2)
    assert delivery.buffer_bytes == room_for(cuda.TOGETHER, largest)


def test_large_experts_come_fewer_at_a_time(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(image.n_bytes for image in images)
    for share, together in ((3.5, 3), (0.5, 1)):
        monkeypatch.setattr(cuda, "TOGETHER_BYTES", int(share * largest))
        found = CudaDelivery(RamTier(images), CPU, largest=largest, cores=2, decode_on_device=True)
        assert found.together == together


@pytest.mark.parametrize("on_device", [True, False])
def test_from_disk_each_thread_reads_one(images: Images, on_device: bool) -> None:
    largest = max(image.n_bytes for image in images)
    tier = DiskTier(images)
    found = CudaDelivery(tier, CPU, largest=largest, cores=64, decode_on_device=on_device)
    assert (found.together, found.threads) == (1, cuda.MOST_READERS)
    assert found.buffer_bytes == tier.buffer_bytes + (room_for(1, largest) if on_device else 0)
    assert tier.buffer_bytes >= largest


def test_without_decoding_on_the_device_experts_come_one_by_one(images: Images) -> None:
    found = CudaDelivery(RamTier(images), CPU, largest=9, cores=4, decode_on_device=False)
    assert (found.together, found.buffer_bytes) == (1, 0)
