"""Plots of `moebound bench offload --json`, for plot.py: time per token and hits by budget."""

from __future__ import annotations

from collections import Counter
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import LogLocator

from moebound.bench.offload import OffloadReport
from moebound.bench.offload.report import modelled_s

COLORS = {
    "raw": "#d55e00",
    "compressed": "#0072b2",
    "stock": "#999999",
    "accelerate": "#cc79a7",
    "llama.cpp": "#009e73",
}
_MARKERS = {"disk": "o", "ram": "s", "device": "^"}
_STYLES = {"disk": "-", "ram": "--", "device": "-."}

Curve = tuple[str, str, str, list[dict[str, Any]]]
"""A label, a colour, a tier, and rows by ascending budget."""


def plot_time(report: OffloadReport) -> Any:
    """Median milliseconds a token by budget, up to the 99th percentile; dotted, what the cost model
    says of these loads if reading and computing overlap; peers, that have no budget, across.

    Rows of version 1 have no dotted line: their loads are not of the timed tokens alone."""
    routings = list(dict.fromkeys(_routing(row) for row in report.rows))
    figure, axes = plt.subplots(
        1, len(routings), figsize=(0.6 + 4.2 * len(routings), 4.2), squeeze=False, sharey=True
    )
    for axis, routing in zip(axes.flat, routings, strict=True):
        for label, color, tier, rows in _curves(report, routing):
            budgets = [100 * row["budget"] for row in rows]
            middle = [1e3 * row["tpot_p50_s"] for row in rows]
            slow = [1e3 * row["tpot_p99_s"] - at for row, at in zip(rows, middle, strict=True)]
            axis.errorbar(budgets, middle, [[0] * len(slow), slow], label=label, color=color,
                          ls=_STYLES[tier], marker=_MARKERS[tier], markersize=4, capsize=2,
                          elinewidth=0.7)  # fmt: skip
            if all("prompt_stats" in row for row in rows):
                model = [1e3 * modelled_s(row) for row in rows]
                axis.plot(budgets, model, ls=":", lw=1, color=color, marker=_MARKERS[tier],
                          markersize=2)  # fmt: skip
        peers = Counter[str]()
        for row in report.rows:
            if row["budget"] is None and _routing(row) == routing and "error" not in row:
                steps = peers[row["how"]]
                peers[row["how"]] += 1
                axis.axhline(1e3 * row["tpot_p50_s"], color=_paler(COLORS[row["how"]], steps),
                             lw=1, ls="-.", label=_peer(row))  # fmt: skip
        if any("prompt_stats" in row for row in report.rows):
            axis.plot([], [], ls=":", lw=1, color="black", label="cost model, overlapped")
        _budget_axis(axis, report)
        axis.set_title(_title(routing), fontsize=8)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.tick_params(axis="y", labelleft=True)
        _legend(axis)
    axes[0, 0].set_ylabel("ms a token")
    limit = report.settings.get("memory_limit")
    if limit:
        figure.suptitle(f"each run within {limit / 1e9:g} GB, files it reads included", fontsize=8)
    figure.tight_layout()
    return figure


def plot_hits(report: OffloadReport) -> Any:
    """Of the experts asked for, how many were there, by budget; the best policy as simulated."""
    figure, axis = plt.subplots(figsize=(4.8, 4.2))
    for routing in dict.fromkeys(_routing(row) for row in report.rows):
        seen = set[tuple[float, ...]]()
        for label, color, tier, rows in _curves(report, routing):
            hits = [100 * row["stats"]["hit_ratio"] for row in rows]
            # A cache of decoded experts does not care where they come from: one curve for all.
            if tuple(hits) in seen:
                continue
            seen.add(tuple(hits))
            own = routing == "own"
            axis.plot([100 * row["budget"] for row in rows], hits, color=color,
                      ls="-." if own else _STYLES[tier], marker=_MARKERS[tier], markersize=4,
                      label=label + (", own routing" if own else ""))  # fmt: skip
    if report.policies:
        axis.plot([100 * row["budget"] for row in report.policies],
                  [100 * row["hit_ratio"] for row in report.policies], ls="", marker="_",
                  markersize=12, color="black", label="best policy, simulated")  # fmt: skip
        axis.plot([100 * row["budget"] for row in report.policies],
                  [100 * row["hit_ratio"] / row["share_of_limit"] for row in report.policies],
                  ls=":", lw=1, color="black", label="Belady's limit")  # fmt: skip
    _budget_axis(axis, report)
    axis.set_ylim(0, 103)
    axis.set_ylabel("hits, % of experts asked for")
    _legend(axis)
    figure.tight_layout()
    return figure


def _curves(report: OffloadReport, routing: str) -> list[Curve]:
    """One for each way of running that has budgets; a policy is named where there are several."""
    ways = dict[tuple[Any, ...], list[dict[str, Any]]]()
    for row in report.rows:
        if row["how"] == "offloaded" and "error" not in row and _routing(row) == routing:
            way = (row["source"], row["tier"], row["policy"], row["predictor"])
            ways.setdefault(way, []).append(row)
    several = len({way[2:] for way in ways}) > 1
    found = list[Curve]()
    alike = Counter[tuple[str, str]]()
    for (source, tier, policy, predictor), rows in ways.items():
        label = f"{source}, {tier}" + (f", {policy} {predictor}" if several else "")
        color = _paler(COLORS[source], alike[source, tier])
        alike[source, tier] += 1
        found.append((label, color, tier, sorted(rows, key=lambda row: float(row["budget"]))))
    return found


def _peer(row: dict[str, Any]) -> str:
    """A peer, and how many bits its experts' weights take where they are quantized."""
    return (
        str(row["how"])
        + (f" {row['quantized']}, {row['expert_bits']:.1f} bits" if row.get("quantized") else "")
        + (", mapped" if row.get("mapped") else "")
    )


def _paler(color: str, steps: int) -> str:
    """Of several ways to run the same, each is nearer to white."""
    keep = 0.55**steps
    red, green, blue = (1 - keep * (1 - part) for part in to_rgb(color))
    return to_hex((red, green, blue))


def _budget_axis(axis: Any, report: OffloadReport) -> None:
    budgets = sorted({100 * row["budget"] for row in report.rows if row["budget"] is not None})
    axis.set_xscale("log")
    axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axis.minorticks_off()
    axis.set_xlabel("memory for experts, % of all of them decoded")


def _legend(axis: Any) -> None:
    """Below: lines and marks may be anywhere."""
    axis.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def _routing(row: dict[str, Any]) -> str:
    return str(row.get("routing", "forced"))  # version 1 had no other


def _title(routing: str) -> str:
    return "routing follows a trace" if routing == "forced" else "the model's own routing"
