"""The GPU benchmark as tables for people."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from moebound.bench.gpu.benchmark import GpuReport
from moebound.bench.gpu.throughput import DecodeRow
from moebound.codec.device import DEFAULT_SCHEDULE, Schedule


def render_gpu(report: GpuReport) -> tuple[Table, ...]:
    """The best of each segment size, what the host and encoding take, what copies cost."""
    return (
        _decode(report),
        _transfer(report),
        _host(report),
        _encode(report),
        _schedules(report),
    )


def _decode(report: GpuReport) -> Table:
    gpu = report.environment["gpu"]
    table = Table(
        title=f"Decoding on {gpu['name']}",
        caption=(
            f"{len(report.checks)} checks passed: the CPU's bits. Tables and segments, from bytes "
            f"on the device to bfloat16; medians. Copying on the device: "
            f"{report.device_copy_gb_per_s:.0f} GB/s. {report.nvcomp or ''}"
        ),
    )
    for name in ("matrices", "rate", "segment", "bits/weight", "experts", "segments", "schedule"):
        table.add_column(name, justify="left" if name == "matrices" else "right", no_wrap=True)
    for name in ("ms", "20 to 80 %", "Gw/s", "GB/s out"):
        table.add_column(name, justify="right")
    last = None
    for row in _best(report.decode):
        if last is not None and (row.kind, row.rate) != last:
            table.add_section()
        last = (row.kind, row.rate)
        table.add_row(
            row.kind,
            f"{row.rate:g}",
            str(row.segment_weights),
            f"{row.bits_per_weight:.3f}",
            str(row.n_experts),
            str(row.n_segments),
            _words(row.schedule) + ("" if row.aligned else ", odd addresses"),
            f"{1e3 * row.decode.p50_s:.3f}",
            f"{1e3 * row.decode.p20_s:.3f} to {1e3 * row.decode.p80_s:.3f}",
            f"{row.gweights_per_s:.1f}",
            f"{2 * row.gweights_per_s:.0f}",
        )
    return table


def _best(rows: list[DecodeRow]) -> list[DecodeRow]:
    """The quickest schedule of each case."""
    best: dict[tuple[str, float, int, int, bool], DecodeRow] = {}
    for row in rows:
        case = (row.kind, row.rate, row.segment_weights, row.n_experts, row.aligned)
        if case not in best or row.gweights_per_s > best[case].gweights_per_s:
            best[case] = row
    return list(best.values())


def _schedules(report: GpuReport) -> Table:
    """Gweights/s of every schedule where all were compared."""
    rows = [row for row in report.decode if row.schedule != DEFAULT_SCHEDULE]
    segments = sorted({row.segment_weights for row in rows})
    cases = sorted({(row.kind, row.rate, row.n_experts) for row in rows})
    table = Table(title="Schedules, Gweights/s", caption="Columns: weights of a segment.")
    for name in ("matrices", "experts", "schedule"):
        table.add_column(name, no_wrap=True)
    for weights in segments:
        table.add_column(str(weights), justify="right")
    for kind, rate, n_experts in cases:
        table.add_section()
        found = {
            (row.schedule, row.segment_weights): row.gweights_per_s
            for row in report.decode
            if (row.kind, row.rate, row.n_experts, row.aligned) == (kind, rate, n_experts, True)
        }
        for schedule in dict.fromkeys(schedule for schedule, _ in found):
            speeds = (found.get((schedule, weights)) for weights in segments)
            cells = ["" if speed is None else f"{speed:.1f}" for speed in speeds]
            table.add_row(kind, str(n_experts), _words(schedule), *cells)
    return table


def _words(schedule: Schedule) -> str:
    """What is not as it is by default."""
    given, plain = asdict(schedule), asdict(DEFAULT_SCHEDULE)
    return ", ".join(f"{name}={given[name]}" for name in given if given[name] != plain[name]) or "-"


def _host(report: GpuReport) -> Table:
    table = Table(
        title="The host's part of a launch",
        caption="Medians. Read: parse envelopes, checksums included; plan: the metadata; resident: "
        "launch with the metadata on the device.",
    )
    for name in ("matrices", "experts", "read ms", "plan ms", "launch ms", "resident ms"):
        table.add_column(name, justify="left" if name == "matrices" else "right", no_wrap=True)
    for row in report.host:
        timings = (f"{1e3 * t.p50_s:.3f}" for t in (row.read, row.plan, row.launch, row.resident))
        table.add_row(row.kind, str(row.n_experts), *timings)
    return table


def _encode(report: GpuReport) -> Table:
    table = Table(
        title="Encoding a matrix that is on the device, to the CPU's bytes",
        caption="Total: wall clock of the host, from the tensor to bytes in host memory.",
    )
    for name in ("matrices", "rate", "segment", "coder ms", "coder Gw/s", "total ms", "total Gw/s"):
        table.add_column(name, justify="left" if name == "matrices" else "right", no_wrap=True)
    for row in report.encode:
        table.add_row(
            row.kind,
            f"{row.rate:g}",
            str(row.segment_weights),
            f"{1e3 * row.code.p50_s:.3f}",
            f"{row.n_weights / row.code.p50_s / 1e9:.1f}",
            f"{1e3 * row.total.p50_s:.2f}",
            f"{row.n_weights / row.total.p50_s / 1e9:.2f}",
        )
    return table


def _transfer(report: GpuReport) -> Table:
    table = Table(
        title="Experts from pinned host memory to bfloat16 on the device",
        caption="Wall clock of the host, medians. bfloat16: as if raw values had travelled.",
    )
    for name in ("what", "rate", "experts", "a launch", "MB", "ms", "GB/s", "GB/s of bfloat16"):
        table.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
    for row in report.transfer:
        table.add_row(
            row.what,
            f"{row.rate:g}",
            str(row.n_experts),
            str(row.group),
            f"{row.n_bytes / 1e6:.1f}",
            f"{1e3 * row.total.p50_s:.3f}",
            f"{row.gb_per_s:.1f}",
            f"{row.bf16_gb_per_s:.1f}",
        )
    return table
