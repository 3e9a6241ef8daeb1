"""The whole benchmark: correctness, then kernels, then copies."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from moebound.bench.environment import describe
from moebound.bench.gpu.cases import encode_expert, expert
from moebound.bench.gpu.throughput import (
    DecodeRow,
    EncodeRow,
    HostRow,
    time_decode,
    time_encode,
    time_host,
)
from moebound.bench.gpu.transfer import TransferRow, device_copy_gb_per_s, time_transfer
from moebound.bench.gpu.verify import Check, verify
from moebound.codec.bound import BoundCodec
from moebound.codec.device import DEFAULT_SCHEDULE, Schedule
from moebound.errors import BackendUnavailable, MoeboundError

FORMAT = 1
KINDS = ("gaussian", "gaussian-rows-cols")


SCHEDULES = (DEFAULT_SCHEDULE, Schedule(wide=True), Schedule(wide=False), Schedule(together=4))
"""Compared at the middle rate; elsewhere the first."""


@dataclass(frozen=True)
class GpuSettings:
    """What is measured. segments: weights of each."""

    rates: tuple[float, ...] = (0.05, 0.3, 0.8)
    segments: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 1 << 18)
    experts: tuple[int, ...] = (1, 6, 64)


@dataclass(frozen=True)
class GpuReport:
    """What was found. nvcomp: None where it was timed, else why not."""

    environment: dict[str, Any]
    checks: list[Check]
    device_copy_gb_per_s: float
    decode: list[DecodeRow]
    host: list[HostRow]
    encode: list[EncodeRow]
    transfer: list[TransferRow]
    nvcomp: str | None
    seconds: float
    settings: GpuSettings = field(default_factory=GpuSettings)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "environment": self.environment,
            "checks": [vars(check) for check in self.checks],
            "device_copy_gb_per_s": self.device_copy_gb_per_s,
            "decode": [row.to_json() for row in self.decode],
            "host": [row.to_json() for row in self.host],
            "encode": [row.to_json() for row in self.encode],
            "transfer": [row.to_json() for row in self.transfer],
            "nvcomp": self.nvcomp,
            "seconds": self.seconds,
        }


def run(
    settings: GpuSettings | None = None, *, say: Callable[[str], None] | None = None
) -> GpuReport:
    """Measure on the current CUDA device.

    Raises BackendUnavailable without one, or without triton; MoeboundError if a check fails: then
    nothing is timed.
    """
    chosen, say = settings or GpuSettings(), say or (lambda _: None)
    environment = _environment()
    start = time.monotonic()
    say("checking")
    checks = verify("cuda")
    failed = [check for check in checks if not check.passed]
    if failed:
        what = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise MoeboundError(f"{len(failed)} of {len(checks)} checks failed: {what}")
    decode = _decode_rows(chosen, say)
    host, encode = _host_rows(chosen, say), _encode_rows(chosen, say)
    transfer = _transfer_rows(chosen, say)
    return GpuReport(
        environment,
        checks,
        device_copy_gb_per_s(),
        decode,
        host,
        encode,
        transfer,
        _nvcomp(),
        time.monotonic() - start,
        chosen,
    )


def _decode_rows(settings: GpuSettings, say: Callable[[str], None]) -> list[DecodeRow]:
    """Every segment size at every rate; schedules and the most experts at the middle one."""
    rows: list[DecodeRow] = []
    middle = settings.rates[len(settings.rates) // 2]
    for kind in KINDS:
        matrices = expert(kind)
        for rate in settings.rates:
            for weights in settings.segments:
                say(f"decode {kind}, rate {rate:g}, segments of {weights}")
                coded = encode_expert(matrices, kind, rate, weights)
                for n_experts in settings.experts if rate == middle else settings.experts[:2]:
                    most = 32768 if n_experts <= 6 else 8192
                    compared = rate == middle and weights <= most
                    schedules = SCHEDULES if compared else SCHEDULES[:1]
                    rows += time_decode(coded, n_experts, schedules)
                    if compared and weights == _segments_for_copies(settings):
                        rows += time_decode(coded, n_experts, SCHEDULES[:1], aligned=False)
    return rows


def _host_rows(settings: GpuSettings, say: Callable[[str], None]) -> list[HostRow]:
    say("the host's part")
    middle = settings.rates[len(settings.rates) // 2]
    return [
        time_host(encode_expert(expert(kind), kind, middle, _segments_for_copies(settings)), n)
        for kind in KINDS
        for n in settings.experts
    ]


def _encode_rows(settings: GpuSettings, say: Callable[[str], None]) -> list[EncodeRow]:
    rows = []
    for kind in KINDS:
        matrices = expert(kind)
        for rate in settings.rates:
            say(f"encode {kind}, rate {rate:g}")
            for weights in (min(settings.segments), _segments_for_copies(settings)):
                rows.append(time_encode(encode_expert(matrices, kind, rate, weights)))
    return rows


def _transfer_rows(settings: GpuSettings, say: Callable[[str], None]) -> list[TransferRow]:
    rows = []
    matrices = expert(KINDS[1])
    for rate in settings.rates:
        coded = encode_expert(matrices, KINDS[1], rate, _segments_for_copies(settings))
        for n_experts in settings.experts:
            say(f"copy {n_experts} experts, rate {rate:g}")
            groups = tuple(sorted({1, min(2, n_experts), min(8, n_experts)}))
            rows += time_transfer(coded, n_experts, groups)
    return rows


def _segments_for_copies(settings: GpuSettings) -> int:
    """16,384 weights, or what is nearest of those that are measured."""
    return min(settings.segments, key=lambda weights: abs(weights - 16384))


def _environment() -> dict[str, Any]:
    try:
        import torch
        import triton
    except ImportError as error:
        raise BackendUnavailable(f"{error.name} is missing: pip install 'moebound[gpu]'") from None
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            f"no CUDA device: torch {torch.__version__} on {platform.machine()} finds none"
        )
    properties = torch.cuda.get_device_properties(0)
    facts = describe()
    facts["gpu"] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
    facts["default_segment_weights"] = BoundCodec().segment_weights
    return facts


def _nvcomp() -> str | None:
    if find_spec("nvidia") is None or find_spec("nvidia.nvcomp") is None:
        return "nvCOMP is not installed: its ANS was not timed"
    return "nvCOMP is installed, but not timed here"
