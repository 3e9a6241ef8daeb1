"""The page's own figures: the plan, and what a bound and a size cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moebound.demo.report import Report, StoreRow
from moebound.page import INK, MARKERS, SERIES, drawing
from moebound.plan import Plan

_SIZE_INCHES = (5.6, 3.9)


def series_of(report: Report) -> dict[str, int]:
    """What a store is called -> its colour and marker, the same in every figure and table."""
    titles = [row.title for row in report.rows if row.rate is not None]
    return {title: index for index, title in enumerate(dict.fromkeys(titles))}


def rate_against_kl(report: Report) -> str:
    """How far the model moves as the bound grows; both axes logarithmic."""
    rows = [row for row in report.rows if not row.planned]
    return _plot(
        rows,
        series_of(report),
        lambda row: row.rate,
        x_label="rate: the bound, as a share of the mean |weight|",
        log_x=True,
        alt="KL divergence against rate, one line per codec",
    )


def bits_against_kl(report: Report) -> str:
    """What a closer model costs in bits; the exact codecs as a line to stay left of."""
    exact = [row for row in report.rows if row.rate is None]
    return _plot(
        report.rows,
        series_of(report),
        lambda row: row.expert_bits_per_weight,
        x_label="bits per weight, experts",
        log_x=False,
        alt="KL divergence against bits per weight, one line per codec and one for plans",
        verticals={f"{row.codec}: KL 0": row.expert_bits_per_weight for row in exact},
    )


def _plot(
    rows: Sequence[StoreRow],
    series: dict[str, int],
    x_of: Callable[[StoreRow], float | None],
    *,
    x_label: str,
    log_x: bool,
    alt: str,
    verticals: dict[str, float] | None = None,
) -> str:
    def draw(figure: Any) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axes = figure.add_subplot()
        for title, index in series.items():
            chosen = [r for r in rows if r.title == title and r.score.answer_kl_nats > 0]
            if not chosen:
                continue
            far = [(row.score.answer_kl_nats, row.score.answer_kl_stderr) for row in chosen]
            axes.errorbar(
                [x_of(row) for row in chosen],
                [kl for kl, _ in far],
                # On a logarithmic axis a bar to 0 has no end.
                yerr=[
                    [min(2 * error, 0.9 * kl) for kl, error in far],
                    [2 * error for _, error in far],
                ],
                label=title,
                color=SERIES[index % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)],
                # Later markers are hollow and larger, so that those that coincide are all seen.
                markersize=5 + 2 * index,
                markerfacecolor=SERIES[0] if index == 0 else "none",
                linewidth=1.6,
                elinewidth=1.1,
                capsize=2.5,
            )
        axes.set_yscale("log")
        axes.set_ylabel("KL to the original, solutions, nats a token")
        axes.set_xlabel(x_label)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(
                FixedLocator(sorted({row.rate for row in rows if row.rate is not None}))
            )
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for label, x in (verticals or {}).items():
            axes.axvline(x, color=INK, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                label, (x, 0.5), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                textcoords="offset points", rotation=90, ha="right", va="center",
            )  # fmt: skip
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(True, which="major", linewidth=0.7)
        axes.legend(loc="best")

    return drawing(_SIZE_INCHES, draw, name=alt, alt=alt)


def plan_picture(plan: Plan, uniform_rate: float) -> str:
    """Every expert's bound, layers down and experts across: over the one rate that takes as many
    bytes for all. Of an expert with several bounds, their geometric mean."""
    layers = sorted({expert.key.layer for expert in plan.experts})
    grid = np.full((len(layers), 1 + max(e.key.expert for e in plan.experts)), np.nan)
    for expert in plan.experts:
        rates = [bound.value for bound in expert.bounds.values()]
        place = layers.index(expert.key.layer), expert.key.expert
        grid[place] = np.exp(np.log(rates).mean()) / uniform_rate

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import FuncFormatter

        axes = figure.add_subplot()
        most = max(2.0, float(np.nanquantile(np.exp(np.abs(np.log(grid))), 0.99)))
        image = axes.imshow(
            np.ma.masked_invalid(grid), aspect="auto", interpolation="none", cmap="RdBu",
            norm=LogNorm(1 / most, most),
        )  # fmt: skip
        step = max(1, len(layers) // 13)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.015, format=plain, extend="both")
        bar.set_ticks([tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8) if 1 / most <= tick <= most])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        bar.set_label(f"bound over {uniform_rate:g}")

    alt = "The bound of every expert over that of the uniform store, by layer and expert"
    return drawing((10.0, 1.2 + 0.15 * len(layers)), draw, name="plan", alt=alt)
