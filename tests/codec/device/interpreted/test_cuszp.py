"""cuSZp's kernels have the CPU's bytes and bits, and refuse what the CPU refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs where triton interprets", allow_module_level=True)
pytest.importorskip("triton")

import torch

from moebound.codec import cuszp as on_cpu
from moebound.codec.cuszp import BLOCK, CHUNK, MODES
from moebound.codec.device import cuszp as on_device
from moebound.errors import BoundError, BoundViolatedError, CodecError, CorruptionError
from moebound.types import Array

every_mode = pytest.mark.parametrize("mode", MODES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _arrays() -> dict[str, Array]:
    rng = np.random.default_rng(7)
    noise = (0.02 * rng.standard_normal(CHUNK + 100)).astype(np.float32)
    walk = (3 + np.cumsum(0.001 * rng.standard_normal(3000))).astype(np.float32)
    odd = noise[:2000].copy()
    odd[rng.random(2000) < 0.5] = 0
    for value in (np.nan, np.inf, -np.inf, 1e30, -1e30, 1e-42):
        odd[rng.random(2000) < 0.01] = value
    return {
        "one": noise[:1],
        "a block": noise[:BLOCK],
        "ragged": noise[: BLOCK + 1],
        "two chunks": noise,
        "walk": walk,
        "odd": odd,
        "any bits": rng.integers(0, 1 << 32, 4000, np.uint32).view(np.float32),
        "zeros": np.zeros(100, np.float32),
    }


ARRAYS = _arrays()


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """NumPy stands in for the device, and warns where a device does not."""
    with np.errstate(all="ignore"):
        yield


def _stream(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


@every_mode
@pytest.mark.parametrize("name", ARRAYS)
def test_bytes_and_bits_are_those_of_the_cpu(name: str, mode: str) -> None:
    x = ARRAYS[name]
    for bound in (0.003, 1e-6):
        stream = on_cpu.encode_stream(x, bound, mode=mode)
        found = on_device.encode_stream(torch.from_numpy(x), bound, mode=mode)
        assert found.numpy().tobytes() == stream
        values = torch.from_numpy(on_cpu.decode_stream(stream, x.size, bound, mode=mode))
        for dtype in DTYPES:
            decoded = on_device.decode_stream(found, x.size, bound, mode=mode, dtype=dtype)
            same = decoded.view(torch.uint8).equal(values.to(dtype).view(torch.uint8))
            assert same, f"ε = {bound:g}, {dtype}"


@every_mode
def test_programs_of_several_rounds(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a program does a few blocks at a time, and a few times."""
    x = ARRAYS["two chunks"][: 11 * BLOCK + 5]
    stream = on_cpu.encode_stream(x, 0.003, mode=mode)
    for shape in ((2, 4), (1, 8), (4, 1)):
        monkeypatch.setattr(on_device, "INTERPRETED_SHAPE", shape)
        found = on_device.encode_stream(torch.from_numpy(x), 0.003, mode=mode)
        assert found.numpy().tobytes() == stream
        decoded = on_device.decode_stream(found, x.size, 0.003, mode=mode)
        assert np.array_equal(
            decoded.numpy(), on_cpu.decode_stream(stream, x.size, 0.003, mode=mode)
        )


@every_mode
def test_a_stream_at_an_odd_address(mode: str) -> None:
    x = ARRAYS["walk"]
    stream = on_cpu.encode_stream(x, 0.003, mode=mode)
    found = on_device.decode_stream(_stream(b"\0" + stream)[1:], x.size, 0.003, mode=mode)
    assert np.array_equal(found.numpy(), on_cpu.decode_stream(stream, x.size, 0.003, mode=mode))


@every_mode
def test_damage_is_refused_before_it_is_read_by(mode: str) -> None:
    x = ARRAYS["walk"]
    stream = on_cpu.encode_stream(x, 0.003, mode=mode)
    unknown, longer, behind = bytearray(stream), bytearray(stream), bytearray(stream)
    unknown[3] = 64
    longer[3] ^= 1
    behind[1023] = 1
    bad = (stream[:-1], stream + b"\0", stream[:1000], b"", unknown, longer, behind)
    for damaged in bad:
        with pytest.raises(CorruptionError, match="cuszp"):
            on_device.decode_stream(_stream(bytes(damaged)), x.size, 0.003, mode=mode)


@every_mode
def test_blocks_of_any_bits_decode_as_on_the_cpu(mode: str) -> None:
    """Rates that are sound, payloads that no encoder wrote: no error, and the same values."""
    rng = np.random.default_rng(5)
    codes = np.zeros(1024, np.uint8)
    codes[:40] = rng.integers(0, 32, 40) | (
        rng.integers(0, 5, 40) << 5 | 0x80 if mode == "outlier" else 0
    )
    rates, outliers = codes.astype(int) & 31, np.where(codes >= 128, (codes >> 5 & 3) + 1, 0)
    n_bytes = np.where((rates > 0) | (outliers > 0), 4 + 4 * rates + outliers, 0).sum()
    stream = codes.tobytes() + rng.bytes(int(n_bytes))
    n = 40 * BLOCK - 3
    found = on_device.decode_stream(_stream(stream), n, 0.25, mode=mode)
    assert np.array_equal(found.numpy(), on_cpu.decode_stream(stream, n, 0.25, mode=mode))


@every_mode
def test_nothing(mode: str) -> None:
    stream = on_device.encode_stream(torch.empty(0), 0.1, mode=mode)
    assert stream.numel() == 0
    assert on_device.decode_stream(stream, 0, 0.1, mode=mode).numel() == 0
    with pytest.raises(CorruptionError):
        on_device.decode_stream(_stream(b"\0"), 0, 0.1, mode=mode)


def test_what_it_cannot_take() -> None:
    x = torch.ones(64)
    stream = on_device.encode_stream(x, 0.1)
    with pytest.raises(CodecError, match="contiguous float32"):
        on_device.encode_stream(x.double(), 0.1)
    with pytest.raises(CodecError, match="contiguous float32"):
        on_device.encode_stream(x[::2], 0.1)
    with pytest.raises(CodecError, match="mode"):
        on_device.encode_stream(x, 0.1, mode="3d")
    with pytest.raises(BoundError):
        on_device.encode_stream(x, 0.0)
    with pytest.raises(CodecError, match="uint8"):
        on_device.decode_stream(stream.float(), 64, 0.1)
    with pytest.raises(CodecError, match="float16"):
        on_device.decode_stream(stream, 64, 0.1, dtype=torch.float64)


def test_the_benchmark_verifies_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebound.bench.gpu import cuszp as bench

    monkeypatch.setattr(bench, "_arrays", lambda: iter([("ragged", ARRAYS["ragged"])]))
    assert bench.verify(device="cpu") == 3 * 3 * 4
    monkeypatch.setattr(
        on_device, "encode_stream", lambda x, *_, **__: torch.zeros(3, dtype=torch.uint8)
    )
    with pytest.raises(BoundViolatedError, match="stream: 3 bytes, the CPU has"):
        bench.verify(device="cpu")
