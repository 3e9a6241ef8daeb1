"""Time a token by memory, as `running` computes it: a curve for each rate and kind of slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moebound.extras import need
from moebound.files.durable import disk_errors
from moebound.fit.estimate import Estimate
from moebound.fit.running import Machine, all_running
from moebound.fit.shape import Shape

_COLORS = ("#2f6db5", "#d1702c", "#3f8f5b", "#8a5aa8", "#8a9099")
_STEPS = 120


def plot_running(shape: Shape, estimates: list[Estimate], machine: Machine, file: Path) -> Path:
    """Write it as what the file's ending says. Raises BackendUnavailable without matplotlib,
    StoreError if the disk refuses."""
    need("matplotlib", "fit --plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    most = 1.1 * (2 * shape.n_weights + 1.5e9)
    least = min(way.floor_bytes for way in all_running(shape, estimates, machine, 0))
    sizes = np.geomspace(least, most, _STEPS).astype(np.int64).tolist()
    columns = [all_running(shape, estimates, machine, memory) for memory in sizes]
    figure = Figure(figsize=(6.4, 4.4))
    axis = figure.subplots()
    rates = [None, *(e.rate for e in estimates)]
    for ways in zip(*columns, strict=True):
        first = ways[0]
        name = "as it is, bfloat16" if first.rate is None else f"rate {first.rate:g}"
        axis.plot(
            [memory / 1e9 for memory in sizes],
            [float("nan") if way.seconds is None else 1e3 * way.seconds for way in ways],
            color=_COLORS[(rates.index(first.rate) - 1) % len(_COLORS)],
            ls="--" if first.slots == "codes" else "-",
            label=f"{name}, slots of {first.slots}",
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("memory of the machine, GB")
    axis.set_ylabel("ms a token, computed")
    axis.set_title(
        f"{shape.name}: computed, not tried; {machine.cpu or 'this machine'}, "
        f"{machine.threads} threads, disk {machine.disk / 1e9:g} GB/s",
        fontsize=8, loc="left",
    )  # fmt: skip
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
