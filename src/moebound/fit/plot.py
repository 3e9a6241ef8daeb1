"""Time a token by memory, as `running` and `placing` compute it: a curve for each rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebound.extras import need
from moebound.files.durable import disk_errors
from moebound.fit.estimate import ROOM, Estimate
from moebound.fit.gpu import Gpu
from moebound.fit.placing import Host, Placed, place_all
from moebound.fit.running import Machine, Running, all_running
from moebound.fit.shape import Shape
from moebound.offload.codes import SlotsName

_COLORS = ("#2f6db5", "#d1702c", "#3f8f5b", "#8a5aa8", "#8a9099")
_STEPS = 120
_STYLES: dict[SlotsName, str] = {"values": "-", "codes": "--", "codes4": ":"}


@dataclass(frozen=True)
class _Curve:
    """seconds: by memory; nan where it does not fit."""

    label: str
    color: int
    style: str
    seconds: Sequence[float]


def plot_running(shape: Shape, estimates: list[Estimate], machine: Machine, file: Path) -> Path:
    """On a CPU, dashed for slots of codes, dotted for those of four bits. Writes it as what the
    file's ending says. Raises BackendUnavailable without matplotlib, StoreError if the disk
    refuses."""
    least = min(way.floor_bytes for way in all_running(shape, estimates, machine, 0))
    sizes = _sizes(shape, least)
    columns = [all_running(shape, estimates, machine, memory) for memory in sizes]
    names = list(dict.fromkeys(way.name for way in columns[0]))
    curves = [
        _Curve(
            f"{ways[0].name}, slots of {ways[0].slots}",
            names.index(ways[0].name) - 1,
            _STYLES[ways[0].slots],
            [_seconds(way) for way in ways],
        )
        for ways in zip(*columns, strict=True)
    ]
    title = (
        f"{shape.name}: computed, not tried; {machine.cpu or 'this machine'}, "
        f"{machine.threads} threads, disk {machine.disk / 1e9:g} GB/s"
    )
    return _draw(sizes, curves, "memory of the machine, GB", title, file)


def plot_placing(
    shape: Shape, estimates: list[Estimate], gpu: Gpu, device_bytes: int, host: Host, file: Path
) -> Path:
    """On a GPU, the tier that is taken; a dotted line at the memory
    that was asked for. Writes and raises as `plot_running`."""
    least = min(way.floor_bytes for ways in place_all(shape, estimates, gpu, 0, host)
                for way in ways)  # fmt: skip
    sizes = _sizes(shape, least)
    columns = [
        [ways[0] for ways in place_all(shape, estimates, gpu, memory, host)] for memory in sizes
    ]
    curves = []
    for color, ways in enumerate(zip(*columns, strict=True)):
        tiers = list(dict.fromkeys(_where(way) for way in ways if way.seconds is not None))
        curves.append(
            _Curve(
                f"{ways[0].name}: {', '.join(tiers) or 'does not fit'}",
                color - 1,
                "-",
                [_seconds(way) for way in ways],
            )
        )
    rows = "measured here" if gpu.measured else f"by rows of one {gpu.name}"
    memory = f"{host.ram / 1e9:g} GB of RAM" if host.ram else "RAM not used"
    title = (
        f"{shape.name}: computed, not tried, {rows};\nlink {gpu.link / 1e9:.3g} GB/s, "
        f"{memory}, disk {host.disk / 1e9:g} GB/s"
    )
    return _draw(sizes, curves, "memory of the GPU, GB", title, file, mark=device_bytes)


def _where(way: Placed) -> str:
    if way.decoded == 1:
        return "all decoded"
    if way.tier == "device":
        return "device" if way.compressed == 1 else f"device and {way.rest}"
    return way.tier


def _seconds(way: Running | Placed) -> float:
    return float("nan") if way.seconds is None else way.seconds


def _sizes(shape: Shape, least: int) -> list[int]:
    most = 1.1 * (shape.plain_bytes * shape.n_weights + ROOM)
    found: list[int] = np.geomspace(least, most, _STEPS).astype(np.int64).tolist()
    return found


def _draw(
    sizes: list[int], curves: list[_Curve], x: str, title: str, file: Path, mark: int | None = None
) -> Path:
    need("matplotlib", "fit --plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.4, 4.4))
    axis = figure.subplots()
    for curve in curves:
        axis.plot(
            [memory / 1e9 for memory in sizes],
            [1e3 * seconds for seconds in curve.seconds],
            color=_COLORS[curve.color % len(_COLORS)],
            ls=curve.style,
            label=curve.label,
        )
    if mark is not None:
        axis.axvline(mark / 1e9, color="#555555", ls=":", lw=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel("ms a token, computed")
    axis.set_title(title, fontsize=8, loc="left")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        side.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    with disk_errors(file):
        figure.savefig(file, dpi=150)
    return file
