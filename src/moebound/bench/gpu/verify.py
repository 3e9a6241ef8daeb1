"""Before anything is timed: the device's bits are the CPU's, and what is damaged is found.

Covers what a payload can be: every dtype, 32, 4 and 1 lanes, one table and many, low bits, ragged
last rows and groups, exact copies, patches, envelopes at odd addresses, several at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebound.codec import decode, encode, envelope, to_torch, torch_dtype
from moebound.codec.bound import BoundCodec
from moebound.codec.device import DEFAULT_SCHEDULE, DecodeBatch, Schedule, read_stream
from moebound.errors import CorruptionError
from moebound.types import NUMPY_DTYPES, Array


@dataclass(frozen=True)
class Check:
    """One comparison. found: "same bits", or what was wrong."""

    name: str
    passed: bool
    found: str


_SCHEDULES = {
    ", wide": Schedule(wide=True),
    ", narrow": Schedule(wide=False),
    ", four together": Schedule(together=4),
}


def verify(device: Any) -> list[Check]:
    """Run every check on this device."""
    envelopes = dict(_envelopes())
    checks = [_compare(name, [data], device) for name, data in envelopes.items()]
    for name in ("bf16 gaussian", "bf16 classes"):
        checks.append(_compare(f"{name}, anywhere", [envelopes[name]], device, offset=3))
        for label, schedule in _SCHEDULES.items():
            checks.append(_compare(name + label, [envelopes[name]], device, schedule))
    checks.append(_compare("all at once", list(envelopes.values()), device))
    checks.append(_damage(envelopes["bf16 gaussian"], device))
    checks += [_encoded(name, data, device) for name, data in envelopes.items() if "bf16" in name]
    return checks


def _encoded(name: str, data: bytes, device: Any) -> Check:
    """What the device makes of the decoded values is what the CPU makes of them."""
    import torch

    from moebound.codec.device.encode import encode_on

    parsed = envelope.parse(data)
    bound, segments = parsed.spec.abs_bound, 8192
    if parsed.spec.dtype == "F32" or bound == 0:
        return Check(f"encode {name}", True, "nothing to do")
    array = decode(data)
    tensor = array if isinstance(array, torch.Tensor) else to_torch(np.array(array))
    want = encode(tensor, bound, codec=BoundCodec(segment_weights=segments))
    found = encode_on(tensor.to(device), bound, segment_weights=segments)
    return Check(f"encode {name}", found == want, "same bytes" if found == want else "differ")


def _compare(
    name: str,
    data: list[bytes],
    device: Any,
    schedule: Schedule = DEFAULT_SCHEDULE,
    *,
    offset: int | None = None,
) -> Check:
    """offset: where the bytes of one envelope stand, in place of where a batch puts them."""
    import torch

    batch = DecodeBatch.of(data, offsets=None if offset is None else [offset])
    staging = torch.zeros(batch.n_bytes, dtype=torch.uint8)
    batch.pack(data, staging)
    # Filled with what no decoder writes there, between guards that none may touch.
    blocks = [
        torch.full((s.spec.size + 256,), -7.0, dtype=torch_dtype(s.spec.dtype), device=device)
        for s in batch.streams
    ]
    outs = [b[128:-128] for b in blocks]
    batch.launch(staging.to(device), outs, schedule).check()
    for i, (encoded, block) in enumerate(zip(data, blocks, strict=True)):
        array = decode(encoded)
        assert isinstance(array, np.ndarray)
        bits = f"u{array.itemsize}"
        want = array.reshape(-1).view(bits)
        kind = torch.int16 if array.itemsize == 2 else torch.int32
        whole = block.view(kind).cpu().numpy().view(bits)
        wrong = np.flatnonzero(whole[128:-128] != want)
        if len(wrong):
            return Check(name, False, f"array {i}: {len(wrong)} values differ, first {wrong[0]}")
        if len(np.unique(np.concatenate([whole[:128], whole[-128:]]))) != 1:
            return Check(name, False, f"array {i}: written outside the destination")
    return Check(name, True, "same bits")


def _damage(data: bytes, device: Any) -> Check:
    """Bytes of every segment are turned over behind the host's checks."""
    import torch

    name = "damage"
    stream = read_stream(data)
    assert stream.coded is not None
    batch = DecodeBatch.of([stream])
    rng = np.random.default_rng(5)
    out = torch.empty(stream.spec.size, dtype=torch_dtype(stream.spec.dtype), device=device)
    for _ in range(20):
        hostile = np.frombuffer(data, np.uint8).copy()
        segment = int(rng.integers(len(stream.coded.segments)))
        first = int(stream.coded.segments[segment])
        last = first + 128 + 2 * int(stream.coded.words[segment])
        where = rng.integers(first, last, 40)
        hostile[where] ^= rng.integers(1, 256, 40).astype(np.uint8)
        staging = torch.zeros(batch.n_bytes, dtype=torch.uint8)
        batch.pack([hostile.tobytes()], staging)
        try:
            batch.launch(staging.to(device), [out]).check()
        except CorruptionError as error:
            if f"segment {segment} of" not in str(error):
                return Check(name, False, f"in segment {segment}; reported: {error}")
        else:
            return Check(name, False, f"segment {segment}: not found")
    return Check(name, True, "20 of 20 found, each in its segment")


def _envelopes() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)

    def gaussian(shape: tuple[int, ...], dtype: str = "BF16", spread: float = 0.0) -> Array:
        values = 0.02 * rng.standard_normal(shape)
        if spread:
            values *= np.exp(spread * rng.standard_normal((shape[0], 1)))
            values *= np.exp(spread * rng.standard_normal((1, shape[1])))
        return values.astype(NUMPY_DTYPES[dtype])  # type: ignore[index]

    codec = BoundCodec(segment_weights=8192)
    odd = gaussian((96, 512))
    odd[3, 7], odd[50, 100], odd[95, 511], odd[0, 0] = np.nan, np.inf, -np.inf, 9.0
    yield "bf16 gaussian", encode(gaussian((256, 1408)), 0.005, codec=codec)
    yield "bf16 classes", encode(gaussian((256, 1408), spread=0.5), 0.003, codec=codec)
    yield "bf16 low bits", encode(gaussian((128, 512)), 0.00005, codec=codec)
    yield "bf16 patches", encode(odd, 0.005, codec=codec)
    yield "bf16 ragged", encode(gaussian((300_003,)), 0.005, codec=codec)
    yield "bf16 odd columns", encode(gaussian((333, 421), spread=0.5), 0.005, codec=codec)
    yield "bf16 four lanes", encode(gaussian((20, 1000)), 0.005)
    yield "bf16 one lane", encode(gaussian((7, 77)), 0.005)
    yield "bf16 one weight", encode(gaussian((1,)), 0.005)
    yield "bf16 exact", encode(gaussian((128, 512)), 1e-9)
    yield "f16", encode(gaussian((128, 512), "F16"), 0.0004, codec=codec)
    yield "f32", encode(gaussian((128, 512), "F32"), 0.0004, codec=codec)
    yield "f32 to bf16", encode(gaussian((128, 512), "F32"), 0.002, codec=codec, dtype="BF16")
    yield "lossless bf16", encode(gaussian((256, 512)), 1.0, codec="lossless")
    yield "lossless f16", encode(gaussian((64, 512), "F16"), 1.0, codec="lossless")
    yield "lossless f32", encode(gaussian((64, 512), "F32"), 1.0, codec="lossless")
    yield "raw", encode(gaussian((64, 512)), 1.0, codec="raw")
