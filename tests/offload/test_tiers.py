"""Where experts wait: the same bytes from everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebound.checkpoint import open_checkpoint
from moebound.errors import CheckpointError, CorruptionError
from moebound.offload.images import Images, open_images
from moebound.offload.tiers import PAGE, DirectFiles, DiskTier, RamTier
from moebound.store import compress
from moebound.types import ErrorBound
from tiny_models import make_tiny


@pytest.fixture(scope="module", params=["store", "each", "fused"])
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Of a store, and of checkpoints whose experts are one stretch of bytes, or several."""
    folder = tmp_path_factory.mktemp("images")
    src = make_tiny("mixtral", folder / "src", original_format=request.param != "fused")
    if request.param == "store":
        compress(open_checkpoint(src), folder / "dst", bound=ErrorBound(0.3, "rate"))
        src = folder / "dst"
    return open_images(src)


def test_the_same_bytes(images: Images) -> None:
    kept, direct, ram = DiskTier(images), DiskTier(images, drop_cache=True), RamTier(images)
    buffers = kept.buffer(), direct.buffer()
    for image in images:
        expected = bytearray(image.n_bytes)
        image.read(memoryview(expected))
        assert kept.bytes_of(image, buffers[0]) == expected
        assert direct.bytes_of(image, buffers[1]) == expected
        assert ram.bytes_of(image, memoryview(b"")) == expected
    assert ram.held_bytes == images.n_bytes
    assert kept.held_bytes == 0


@pytest.mark.skipif(not DirectFiles.possible, reason="no O_DIRECT on this system")
def test_reads_around_the_cache_or_says_that_it_cannot(images: Images) -> None:
    direct, buffer = DirectFiles(), DiskTier(images).buffer()
    for image in images:
        found = direct.read(image, buffer)
        if found is None:
            assert image.stretch is None or image.stretch[0].stat().st_size < PAGE
        else:
            expected = bytearray(image.n_bytes)
            image.read(memoryview(expected))
            assert found == expected


@pytest.mark.parametrize("drop_cache", [False, True])
def test_files_that_change(drop_cache: bool, tmp_path: Path) -> None:
    src = make_tiny("mixtral", tmp_path / "src")
    compress(open_checkpoint(src), tmp_path / "dst", bound=ErrorBound(0.3, "rate"))
    images = open_images(tmp_path / "dst")
    last = list(images)[-1]
    tier = DiskTier(images, drop_cache=drop_cache)
    buffer = tier.buffer()
    file = last.spans[0].file
    with open(file, "r+b") as handle:
        handle.truncate(last.spans[0].offset + 10)
    with pytest.raises(CorruptionError, match="ends"):
        tier.bytes_of(last, buffer)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        DiskTier(images, drop_cache=drop_cache).bytes_of(last, buffer)
