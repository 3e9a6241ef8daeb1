"""Plot of stored rows of `moebound bench quality --json`: bits a weight against KL.

    python bench/plot_quality.py bench/results/quality-peers-mixtral.json \
        bench/results/methods-weighted-mixtral.json -o docs/images/quality.png

Rows of `moebound bench methods --json`, of the same model and problems, may stand behind them.
Measures nothing. Two panels with one scale: KL over all tokens, prompts included, and over the
answers' tokens only. Neither is shown without the other: a way can be near the original in one and
far from it in the other.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

FORMAT, VERSION = "moebound.bench.quality", 1
METHODS = "moebound.bench.methods", 1
PANELS = (
    ("kl_nats", "kl_stderr", "all tokens, prompts included"),
    ("answer_kl_nats", "answer_kl_stderr", "tokens of the answers only"),
)
TICKS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Curve:
    """One way to make experts small. begins: what its methods' names begin with, all that stands
    before a colon, or more."""

    begins: str
    label: str
    color: str
    marker: str
    line: str


CURVES = (
    Curve("plan:fisher", "calibrated: planned by what the loss feels", "#cc0077", "s", "-"),
    Curve("calibrated", "calibrated: one rate for all", "#000000", "o", "-"),
    Curve("calibrated, planned", "calibrated: a planned rate each", "#cc79a7", "s", "--"),
    Curve("bound", "bound: one rate for all", "#0072b2", "o", "-"),
    Curve("bound, planned", "bound: a planned rate each", "#56b4e9", "s", "--"),
    Curve("gptq", "GPTQ", "#7b3294", "^", ":"),
    Curve("awq", "AWQ", "#a6761d", "v", ":"),
    Curve("autoround", "AutoRound", "#e31a1c", "P", ":"),
    Curve("gguf:q", "llama.cpp, K-quants", "#1b7837", "<", ":"),
    Curve("gguf:iq", "llama.cpp, I-quants", "#7fbf7b", ">", ":"),
    Curve("rtn", "round to nearest", "#d55e00", "X", ""),
    Curve("hqq", "HQQ", "#e69f00", "D", ""),
    Curve("sz3", "SZ3", "#009e73", "", ":"),
    Curve("cuszp", "cuSZp", "#999999", "", ":"),
)


def join(document: dict[str, Any], other: dict[str, Any], where: str) -> None:
    """Rows of `bench methods` into those of `bench quality`, between their sizes. Raises ValueError
    for rows of something else."""
    if (other.get("format"), other.get("version")) != METHODS:
        raise ValueError(f"{where}: expected {METHODS[0]}, version {METHODS[1]}")
    of = [[one[name] for name in ("source", "task", "n_problems")] for one in (document, other)]
    if of[0] != of[1]:
        raise ValueError(f"{where}: of {of[1]}, expected {of[0]}")
    sizes = [row["bits_per_weight"] for row in document["rows"]]
    document["rows"] += [
        row for row in other["rows"]
        if row["reached"] and min(sizes) - 0.1 <= row["bits_per_weight"] <= max(sizes) + 0.1
    ]  # fmt: skip


def plot_quality(document: dict[str, Any]) -> Any:
    """KL by bits per weight with standard errors, a panel for each set of tokens."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9.2, 4.0), sharey=True)
    for axis, (kl, stderr, title) in zip(axes, PANELS, strict=True):
        for curve in CURVES:
            rows = sorted(_rows(document, curve), key=lambda row: float(row["bits_per_weight"]))
            if not rows:
                continue
            fidelity = [row["fidelity"] for row in rows]
            axis.errorbar(
                [row["bits_per_weight"] for row in rows],
                [one[kl] for one in fidelity],
                [one[stderr] for one in fidelity],
                label=curve.label,
                color=curve.color,
                marker=curve.marker,
                ls=curve.line,
                markersize=6,
                lw=1.5,
                elinewidth=0.8,
            )
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", labelleft=True)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("bits a weight, every byte of the experts counted")
    axes[0].set_ylabel("KL to the original model, nats a token\n(lower is better)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3,
                  frameon=False)  # fmt: skip
    figure.suptitle(
        f"{document['source']}, {document['n_problems']} problems of {document['task']}, "
        f"{document['environment']['date'][:10]}",
        fontsize=8,
        color="#555555",
    )
    figure.tight_layout()
    return figure


def _rows(document: dict[str, Any], curve: Curve) -> list[dict[str, Any]]:
    """A bounded way has one name and a row for each size, a quantizer a name for each size."""
    start = curve.begins if ":" in curve.begins else curve.begins + ":"
    return [
        row
        for row in document["rows"]
        if row["method"] == curve.begins or row["method"].startswith(start)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("methods", type=Path, nargs="*")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/plots/quality.png"))
    options = parser.parse_args()
    document = json.loads(options.results.read_text(encoding="utf-8"))
    if (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        parser.error(f"{options.results}: expected {FORMAT}, version {VERSION}")
    for path in options.methods:
        join(document, json.loads(path.read_text(encoding="utf-8")), str(path))
    from plot import SETTINGS  # beside this script

    mpl.use("Agg")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(SETTINGS):
        plot_quality(document).savefig(options.out, dpi=130)
    print(options.out)


if __name__ == "__main__":
    main()
