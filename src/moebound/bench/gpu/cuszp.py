"""cuSZp's stream on this GPU: the CPU's bytes and bits first, then how fast.

    python -m moebound.bench.gpu.cuszp [OUT.json]

prints a table and writes every row. Kernels are timed with the device's clock, whole calls (with
their wait for the number of bytes) by the host's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebound.bench.environment import describe
from moebound.bench.gpu.cases import EXPERT_WEIGHTS
from moebound.bench.gpu.throughput import time_on_device
from moebound.bench.timing import Timing
from moebound.codec import cuszp as on_cpu
from moebound.codec.device import cuszp as on_device
from moebound.errors import BoundViolatedError, CorruptionError
from moebound.types import Array

FORMAT = 1
RATES = (0.05, 0.3, 0.8)
SHAPES = ((4, 8), (4, 16), (4, 32), (8, 8), (8, 16), (2, 16))
"""Warps and rounds of a program, tried on the first case."""


@dataclass(frozen=True)
class Row:
    """One case. warps, rounds: of a program.

    encode, decode: whole calls, float32 to a stream, and a stream to dtype. measure, write, read:
    kernels alone. bits_per_weight: of the bare stream.
    """

    mode: str
    dtype: str
    rate: float
    n: int
    warps: int
    rounds: int
    bits_per_weight: float
    encode: Timing
    measure: Timing
    write: Timing
    decode: Timing
    read: Timing

    def gweights_per_s(self, part: str) -> float:
        return float(self.n / getattr(self, part).p50_s / 1e9)

    def to_json(self) -> dict[str, Any]:
        parts = ("encode", "measure", "write", "decode", "read")
        return asdict(self) | {f"{p}_gweights_per_s": self.gweights_per_s(p) for p in parts}


def bench_cuszp(
    *, n_experts: int = 16, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Verify, then time, on the current CUDA device. Everything found, as JSON.

    n_experts: of Moonlight's size, 8.65 million weights each, as one array. Raises
    BoundViolatedError if the device has other bytes than the CPU.
    """
    n_checks = verify(say=say)
    rows = []
    n = n_experts * EXPERT_WEIGHTS
    cases = [(m, "bfloat16", r) for m in on_cpu.MODES for r in RATES] + [("plain", "float32", 0.3)]
    for mode, dtype, rate in cases:
        say(f"{mode} to {dtype} at rate {rate:g}")
        shapes = SHAPES if (mode, rate) == ("plain", 0.3) else SHAPES[:1]
        rows += [_time(mode, dtype, rate, n, *shape) for shape in shapes]
    environment = describe() | {"gpu": _gpu()}
    return {
        "format": FORMAT,
        "environment": environment,
        "checks": n_checks,
        "rows": [row.to_json() for row in rows],
    }


def verify(*, device: str = "cuda", say: Callable[[str], None] = lambda _: None) -> int:
    """Compare bytes and decoded bits with the CPU's; how many comparisons there were.

    Raises BoundViolatedError where they differ, or where damage is not found.
    """
    import torch

    n_checks = 0
    for name, x in _arrays():
        for mode in on_cpu.MODES:
            for bound in (0.003, 1e-6, 40.0):
                say(f"checking {name}, {mode}, {bound:g}")
                stream = on_cpu.encode_stream(x, bound, mode=mode)
                found = on_device.encode_stream(torch.from_numpy(x).to(device), bound, mode=mode)
                _same(f"{name}, {mode}, {bound:g}: stream", _bytes(found), stream)
                values = torch.from_numpy(on_cpu.decode_stream(stream, x.size, bound, mode=mode))
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    decoded = on_device.decode_stream(found, x.size, bound, mode=mode, dtype=dtype)
                    what = f"{name}, {mode}, {bound:g}: {dtype}"
                    _same(what, _bytes(decoded), _bytes(values.to(dtype)))
                n_checks += 4
                _damage(found, x.size, bound, mode)
    return n_checks


def _arrays() -> Iterator[tuple[str, Array]]:
    rng = np.random.default_rng(0)
    for n in (1, 31, 32, 33, 1000, 32768, 32769, 1_000_003):
        yield f"{n} weights", (0.02 * rng.standard_normal(n)).astype(np.float32)
    patterns = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    yield "any bits at all", patterns
    yield "a walk", (3 + np.cumsum(0.001 * rng.standard_normal(100_000))).astype(np.float32)
    mostly = (0.02 * rng.standard_normal(100_000)).astype(np.float32)
    mostly[rng.random(mostly.size) < 0.9] = 0
    yield "mostly zeros", mostly


def _damage(stream: Any, n: int, bound: float, mode: str) -> None:
    """Bytes that no encoder makes are refused before they are read by."""
    table = on_cpu.table_n_bytes(n)
    for at, by in ((0, 64), (0, 1), (table - 1, 1)):
        damaged = stream.clone()
        damaged[at] += by
        for bad in (damaged, stream[:-1], stream[: table - 1]):
            try:
                on_device.decode_stream(bad, n, bound, mode=mode)
            except CorruptionError:
                continue
            raise BoundViolatedError(f"damage at byte {at} of {n} weights, {mode}: not found")


def _same(what: str, found: bytes, expected: bytes) -> None:
    if found == expected:
        return
    differ = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
    first = differ[0] if differ else min(len(found), len(expected))
    raise BoundViolatedError(
        f"{what}: {len(found)} bytes, the CPU has {len(expected)}; {len(differ)} differ, "
        f"the first at {first}"
    )


def _bytes(tensor: Any) -> bytes:
    import torch

    data: bytes = tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return data


def _time(mode: str, dtype: str, rate: float, n: int, warps: int, rounds: int) -> Row:
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    x = 0.02 * torch.randn(n, generator=generator, device="cuda")
    bound = float(np.float32(rate * float(x.abs().mean())))
    out = torch.empty(n, dtype=getattr(torch, dtype), device="cuda")
    before = on_device.SHAPE
    on_device.SHAPE = (warps, rounds)
    try:
        stream = on_device.encode_stream(x, bound, mode=mode)
        placed = on_device.place(stream[: on_cpu.table_n_bytes(n)], n, mode)
        decode = lambda: on_device.decode_stream(stream, n, bound, mode=mode, dtype=out.dtype)  # noqa: E731
        return Row(
            mode, dtype, rate, n, warps, rounds, 8 * stream.numel() / n,
            encode=_by_host(lambda: on_device.encode_stream(x, bound, mode=mode)),
            measure=time_on_device(lambda: on_device.measure(x, bound, mode)),
            write=time_on_device(lambda: on_device.write(x, stream, placed, bound, mode)),
            decode=_by_host(decode),
            read=time_on_device(lambda: on_device.read(stream, placed, out, bound, mode)),
        )  # fmt: skip
    finally:
        on_device.SHAPE = before


def _by_host(job: Callable[[], object], repeats: int = 10) -> Timing:
    """Seconds from a call to the device being done. The first is not counted."""
    import torch

    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds[1:])


def _gpu() -> dict[str, Any]:
    import torch
    import triton

    return {
        "name": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def render(report: dict[str, Any]) -> Iterator[str]:
    """The rows as lines of text."""
    yield f"{report['environment']['gpu']}; {report['checks']} comparisons passed"
    parts = ("encode", "measure", "write", "decode", "read")
    yield "mode     to        rate  shape   bits/weight  Gw/s:" + "".join(f"{p:>8}" for p in parts)
    for row in report["rows"]:
        speeds = "".join(f"{row[f'{p}_gweights_per_s']:8.1f}" for p in parts)
        shape = f"{row['warps']}x{row['rounds']}"
        yield (
            f"{row['mode']:8} {row['dtype']:8} {row['rate']:5g}  {shape:6}  "
            f"{row['bits_per_weight']:11.3f}      {speeds}"
        )


def main(arguments: Sequence[str]) -> None:
    report = bench_cuszp(say=lambda text: print(text, file=sys.stderr))
    print("\n".join(render(report)))
    if arguments:
        Path(arguments[0]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
