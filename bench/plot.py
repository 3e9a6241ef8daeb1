"""Plots from stored rows of `moebound bench codec --json` and `bench offload`. Measures nothing.

    python bench/plot.py bench/results/NAME.json [-o out/plots]

Of codecs it writes NAME-size.svg/.png (bits per weight above the entropy of the ideal uniform
quantizer, by rate, one panel a matrix) and NAME-speed.svg/.png (decode speed by codec, with memcpy
as a line); of offloading NAME-time.svg/.png and NAME-hits.svg/.png (plot_offload.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from moebound.bench.codec import BenchReport
from moebound.bench.offload import OffloadReport
from moebound.bench.offload.report import FORMAT as OFFLOAD
from moebound.bench.report import Row

COLORS = {
    "bound": "#0072b2",
    "sz3": "#d55e00",
    "zfp": "#009e73",
    "cuszp": "#cc79a7",
    "lossless": "#999999",
}
SETTINGS: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "moebound",
    "savefig.bbox": "tight",
}


def plot_sizes(report: BenchReport) -> Any:
    """Bits above entropy by rate. For SZ3 also its own bytes, as if rounding were free."""
    matrices = list(dict.fromkeys(row.matrix for row in report.rows))
    columns = min(3, len(matrices))
    lines = -(-len(matrices) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.7 * lines), squeeze=False, sharey=True
    )
    for axis, matrix in zip(axes.flat, matrices, strict=False):
        for asked in dict.fromkeys(row.asked for row in report.rows):
            rows = sorted(_rows(report, matrix, asked), key=lambda row: row.rate)
            # What does not compress to a rate has no place on this scale.
            if not rows or rows[0].bits_per_weight == rows[-1].bits_per_weight:
                continue
            rates = [row.rate for row in rows]
            over = [row.over_entropy_bits for row in rows]
            color = COLORS.get(asked.partition(":")[0])
            axis.plot(rates, over, marker="o", markersize=3, label=asked, color=color)
            if asked == "sz3":
                own = [
                    (report.sz3_stream(matrix, row.rate) or np.nan) - row.entropy_bits_per_weight
                    for row in rows
                ]
                axis.plot(rates, own, ls=":", label="sz3, if rounding were free", color=color)
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(matrix, fontsize=7)
        axis.set_xscale("log")
        rates = sorted({row.rate for row in report.rows})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        # ZFP is several bits above: it would flatten everything else.
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_ylim(-0.2, 10)
    for axis in axes.flat[len(matrices) :]:
        axis.set_visible(False)
    axes[0, 0].legend(frameon=False)
    figure.supxlabel("rate: ε / mean|W|")
    figure.supylabel("bits per weight above entropy")
    figure.tight_layout()
    return figure


def plot_speed(report: BenchReport) -> Any:
    """Median decode speed by codec over all cases; whiskers from the slowest to the fastest."""
    asked = list(dict.fromkeys(row.asked for row in report.rows))
    figure, axis = plt.subplots(figsize=(6.5, 0.5 + 0.45 * len(asked)))
    for i, name in enumerate(asked):
        speeds = [_decoded_gb_per_s(row) for row in report.rows if row.asked == name]
        middle = float(np.median(speeds))
        whiskers = [[middle - min(speeds)], [max(speeds) - middle]]
        axis.barh(i, middle, xerr=whiskers, color=COLORS.get(name, "#56b4e9"), capsize=2)
        axis.annotate(f" {middle:.2f}", (max(speeds), i), va="center")
    memcpy = sum(report.memcpy_gb_per_s) / 2
    axis.axvline(memcpy, color="black", ls="--", lw=1)
    axis.annotate(
        "memcpy ", (memcpy, 0.5), xycoords=("data", "axes fraction"), ha="right", va="center"
    )
    axis.set_yticks(range(len(asked)), asked)
    axis.invert_yaxis()
    axis.set_xlabel(f"decoded GB/s, one thread, {report.environment.get('cpu') or 'unknown CPU'}")
    return figure


def _rows(report: BenchReport, matrix: str, asked: str) -> list[Row]:
    return [row for row in report.rows if (row.matrix, row.asked) == (matrix, asked)]


def _decoded_gb_per_s(row: Row) -> float:
    return row.decode_gweights_per_s * (4 if row.dtype == "F32" else 2)


def _figures(document: dict[str, Any]) -> list[tuple[str, Any]]:
    if document.get("format") == OFFLOAD:
        from plot_offload import plot_hits, plot_time  # beside this script

        offload = OffloadReport.from_json(document)
        return [("time", plot_time(offload)), ("hits", plot_hits(offload))]
    report = BenchReport.from_json(document)
    return [("size", plot_sizes(report)), ("speed", plot_speed(report))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/plots"))
    options = parser.parse_args()
    mpl.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    for results in options.results:
        document = json.loads(results.read_text(encoding="utf-8"))
        with mpl.rc_context(SETTINGS):
            for kind, figure in _figures(document):
                for suffix in ("svg", "png"):
                    target = options.out / f"{results.stem}-{kind}.{suffix}"
                    metadata = {"Date": None} if suffix == "svg" else None
                    figure.savefig(target, dpi=150, metadata=metadata)
                    print(target)
                plt.close(figure)


if __name__ == "__main__":
    main()
