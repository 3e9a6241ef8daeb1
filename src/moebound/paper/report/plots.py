"""The page's figures. Each returns inline SVG, or "" where the study has nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moebound.files.formats.study import Metric
from moebound.page import DASHES, FAINT, INK, MARKERS, SERIES, SOFT, drawing
from moebound.paper.report.by_layer import whole_layers
from moebound.paper.report.cells import Cell, in_order, source_name
from moebound.paper.report.suite import DEEP, SHALLOW, Suite
from moebound.paper.report.tables import Line, Table

_LONGEST = 44


def series_of(sources: Sequence[str]) -> dict[str, int]:
    """Source -> its colour and marker, the same in every figure of a page."""
    return {source: index for index, source in enumerate(in_order(sources))}


def heat_map(suite: Suite, task: str, *, relative: bool = False) -> str:
    """KL by decoder layer (across) and source and bound (down), logarithmic shades.

    relative: each row over its own geometric mean, to compare depths rather than sources.
    """
    found = {key[1:]: at for key, at in whole_layers(suite).items() if key[0] == task}
    rows = [(source, rate) for source in suite.sources
            for rate in sorted(r for s, r in found if s == source)
            if len(found[source, rate]) > 1]  # fmt: skip
    layers = sorted({layer for row in rows for layer in found[row]})
    grid = np.full((len(rows), len(layers)), np.nan)
    for index, row in enumerate(rows):
        for layer, cell in found[row].items():
            if cell.kl is not None and cell.kl > 0:
                grid[index, layers.index(layer)] = cell.kl
    if not np.isfinite(grid).any():
        return ""
    if relative:
        logs = np.where(np.isnan(grid), np.nan, np.log(np.where(np.isnan(grid), 1.0, grid)))
        drawn = np.flatnonzero(np.isfinite(logs).any(axis=1)).tolist()
        grid, rows = logs[drawn], [rows[index] for index in drawn]
        grid = np.exp(grid - np.nanmean(grid, axis=1, keepdims=True))

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm

        axes = figure.add_subplot()
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        if relative:
            high = max(high, 1 / low, 1.01)
            low = 1 / high
        shades = axes.pcolormesh(
            np.ma.masked_invalid(grid),
            cmap="RdBu_r" if relative else "viridis",
            norm=LogNorm(low, high if high > low else low * 10),
            edgecolors="none",
        )
        axes.set_xticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers], fontsize=9)
        names = [f"{_short(source_name(source))}, {100 * rate:g} %" for source, rate in rows]
        axes.set_yticks(np.arange(len(rows)) + 0.5, names, fontsize=9.5)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("decoder layer with an error in all of its experts")
        bar = figure.colorbar(shades, ax=axes, fraction=0.025, pad=0.015, format=_plain())
        if relative:
            bar.set_ticks([t for t in (0.01, 0.1, 0.25, 0.5, 1, 2, 4, 10, 100) if low <= t <= high])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        bar.solids.set_rasterized(False)  # shapes, not a picture inside of the page
        bar.solids.set_edgecolor("face")
        bar.set_label("over the row's mean" if relative else "KL, nats a token")

    height = 1.2 + 0.27 * len(rows)
    what = "KL over its row's mean" if relative else "KL divergence"
    alt = f"{what} by layer and error source on task {task}"
    return drawing((10.5, height), draw, name=f"heat {relative} {task}", alt=alt)


def relative_depth(suites: Sequence[Suite], task: int) -> str:
    """KL of an error in all experts of one layer by relative depth, each model over its own
    geometric mean over layers: one colour a model, simulated errors full, a codec's dashed.

    task: its index in each study. The bound is the largest that all have.
    """
    lines: list[tuple[int, int, str, list[tuple[float, float]]]] = []
    wanted = [[suite.simulation, suite.codec] for suite in suites]
    found = [
        {key[1:]: at for key, at in whole_layers(suite).items()
         if key[0] == suite.study.tasks[task] and len(at) > 1}
        for suite in suites
    ]  # fmt: skip
    shared = set.intersection(*({rate for _, rate in of} for of in found))
    if not shared:
        return ""
    rate = max(shared)
    for model, (suite, of) in enumerate(zip(suites, found, strict=True)):
        for index, source in enumerate(wanted[model]):
            cells = [c for c in of.get((source or "", rate), {}).values() if min(c.kls) > 0]
            if len(cells) > 1:
                logs = {cell.depth: float(np.log(cell.kls).mean()) for cell in cells}
                mean = float(np.mean(list(logs.values())))
                points = [(depth, float(np.exp(logs[depth] - mean))) for depth in sorted(logs)]
                name = f"{suite.study.model}, {source_name(source or '')}"
                lines.append((model, index, name, points))
    if not lines:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axhline(1, color=FAINT, linewidth=0.9)
        for edge in (SHALLOW, DEEP):
            axes.axvline(edge, color=FAINT, linewidth=0.9)
        for model, index, name, points in lines:
            axes.plot(
                *zip(*points, strict=True),
                color=SERIES[model % len(SERIES)],
                marker=MARKERS[model % len(MARKERS)],
                markersize=5,
                markerfacecolor="none" if index else SERIES[model % len(SERIES)],
                linestyle=DASHES[index],
                linewidth=1.5,
                label=name,
            )
        axes.set_yscale("log")
        _log_ticks(axes)
        axes.set_xlabel("relative depth of the layer with an error")
        axes.set_ylabel(f"KL over the model's mean, bound {100 * rate:g} %")
        axes.legend(fontsize=8.5)

    alt = "KL by relative depth of the layer with an error, each model over its own mean"
    return drawing((9.0, 3.9), draw, name=f"relative depth {task}", alt=alt)


def _log_ticks(axes: Any) -> None:
    """1 and 3 of every decade, so that an axis shorter than a decade has numbers too."""
    from matplotlib.ticker import LogLocator

    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(_plain())


def _plain() -> Any:
    """0.001, not a power set in a formula."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def curves(suite: Suite, task: str) -> list[tuple[str, str]]:
    """(title, figure) for each place with several bounds: KL against the bound, by source.

    Points: geometric mean over noise seeds; bars: the lowest and the highest seed.
    """
    places: dict[str, list[Cell]] = {}
    for cell in suite.cells:
        if cell.key.task == task and cell.key.rate and cell.kls and min(cell.kls) > 0:
            places.setdefault(cell.key.selector, []).append(cell)
    order = series_of(suite.sources)
    drawn = []
    for number, (selector, cells) in enumerate(places.items()):
        one_layer_of_many = selector.startswith("layer:")  # the heat map has these
        if len({cell.key.rate for cell in cells}) < 3 or one_layer_of_many:
            continue
        sources = [source for source in order if any(c.key.source == source for c in cells)]

        def draw(figure: Any, cells: list[Cell] = cells, sources: list[str] = sources) -> None:
            axes = figure.add_subplot()
            for source in sources:
                _curve(axes, [c for c in cells if c.key.source == source], order[source])
            rates = sorted({cell.key.rate for cell in cells if cell.key.rate})
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(rates, [f"{100 * rate:g} %" for rate in rates])
            _log_ticks(axes)
            axes.set_xlabel("bound, share of the mean |weight|")
            axes.set_ylabel("KL, nats a token")
            axes.grid(True, which="major", linewidth=0.7)

        label = cells[0].label
        alt = f"KL against the bound, {label}, by error source"
        name = f"curve {task} {number}"
        drawn.append((label, drawing((4.6, 3.3), draw, name=name, alt=alt)))
    return drawn


def _curve(axes: Any, cells: list[Cell], index: int) -> None:
    cells = sorted(cells, key=lambda cell: cell.key.rate or 0.0)
    middle = np.array([np.exp(np.log(cell.kls).mean()) for cell in cells])
    below = middle - [min(cell.kls) for cell in cells]
    above = [max(cell.kls) for cell in cells] - middle
    hollow = index % 2 == 1
    axes.errorbar(
        [cell.key.rate for cell in cells],
        middle,
        yerr=[np.maximum(below, 0), np.maximum(above, 0)],
        color=SERIES[index % len(SERIES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=5.5,
        markerfacecolor="none" if hollow else SERIES[index % len(SERIES)],
        linewidth=1.5,
        linestyle=DASHES[index // len(SERIES) % len(DASHES)],
        elinewidth=1.1,
        capsize=2.5,
    )


def forest(
    tables: Sequence[Table],
    metric: Metric,
    sources: Sequence[str],
    order: dict[str, int],
    title: str,
) -> str:
    """Accuracies with Wilson intervals, a line for each condition; the paper's as diamonds.

    order: what `series_of` gave for all sources of the page.
    """
    rows: list[tuple[Table, Line]] = [
        (table, line) for table in tables for line in table.lines
        if any(s in line.measured and line.measured[s].n for s in sources)
    ]  # fmt: skip
    baseline = next((t.baseline for t in tables if t.baseline is not None and t.baseline.n), None)
    if not rows or baseline is None:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        base = baseline.accuracy(metric)
        axes.axvspan(base.low, base.high, color=FAINT, linewidth=0)
        axes.axvline(base.share, color=INK, linewidth=0.9)
        step = 0.7 / max(len(sources), 1)
        for at, (_, line) in enumerate(rows):
            for index, source in enumerate(sources):
                cell = line.measured.get(source)
                if cell is None or not cell.n:
                    continue
                found, color = cell.accuracy(metric), SERIES[order[source] % len(SERIES)]
                axes.errorbar(
                    found.share,
                    at + step * (index - (len(sources) - 1) / 2),
                    xerr=[[max(found.share - found.low, 0)], [max(found.high - found.share, 0)]],
                    color=color,
                    marker=MARKERS[order[source] % len(MARKERS)],
                    markersize=4.5,
                    markerfacecolor="none" if index % 2 else color,
                    elinewidth=1.2,
                    capsize=0,
                )
            value = None if line.paper is None else getattr(line.paper, metric)
            if value is not None:
                axes.plot(value, at, marker="d", color=SOFT, markersize=6, markerfacecolor="none",
                          linestyle="none")  # fmt: skip
        for at in range(1, len(rows)):
            if rows[at][0] is not rows[at - 1][0]:
                axes.axhline(at - 0.5, color=FAINT, linewidth=0.9)
        names = [_line_name(table, line) for table, line in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{metric.upper()}, share of problems")
        axes.grid(True, axis="x", linewidth=0.7)

    alt = f"{metric.upper()} of every condition with intervals, {title}"
    height = 0.9 + 0.3 * len(rows)
    return drawing((8.4, height), draw, name=f"forest {metric} {title}", alt=alt)


def _line_name(table: Table, line: Line) -> str:
    rate = "" if line.rate is None else f", {100 * line.rate:g} %"
    name = f"T{table.id}" if table.id.isdigit() else table.id
    return f"{name}  {_short(line.label)}{rate}"


def propagation(cells: Sequence[Cell], moe_layers: Sequence[int], task: str) -> str:
    """Behind the perturbed layer: relative change of the residual stream, and changed routing.

    A line for each place, the mean over seeds; full for simulated errors, dashed for a codec's.
    """
    cells = [cell for cell in cells if any(row.residual for row in cell.rows)]
    if not cells:
        return ""
    places = list(dict.fromkeys(cell.label for cell in cells))
    sources = in_order(cell.key.source for cell in cells)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for cell in cells:
            style = {
                "color": SERIES[places.index(cell.label) % len(SERIES)],
                "linestyle": DASHES[sources.index(cell.key.source) % len(DASHES)],
                "linewidth": 1.6,
            }
            first = cell.key.source == sources[0]
            label = _short(cell.label) if first else None
            residual = _mean([row.residual for row in cell.rows if row.residual])
            left.plot(np.arange(len(residual)), np.where(residual > 0, residual, np.nan),
                      label=label, **style)  # fmt: skip
            if any(row.routing for row in cell.rows):
                routing = _mean([row.routing for row in cell.rows if row.routing])
                right.plot(moe_layers[: len(routing)], 100 * routing[: len(moe_layers)], **style)
        left.set_yscale("log")
        _log_ticks(left)
        left.set_title("change of the residual stream")
        left.set_ylabel("relative to its size")
        left.set_xlabel("decoder layer")
        right.set_title("changed routing decisions")
        right.set_ylabel("% of decisions")
        right.set_xlabel("decoder layer")
        for axes in (left, right):
            axes.grid(True, which="major", linewidth=0.7)
        left.legend(fontsize=8.5)

    alt = f"Residual change and changed routing decisions by layer, task {task}"
    return drawing((10.5, 3.9), draw, name=f"propagation {task}", alt=alt)


def _mean(rows: Sequence[Sequence[float]]) -> Any:
    length = min(map(len, rows))
    return np.mean([row[:length] for row in rows], axis=0)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
