"""The page's two plots, as SVG that follows the page's colours.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables, and
leaves text as text: so one drawing serves a light and a dark page, in the page's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from moebound.demo.report import Row

# Stand-in colour -> what the page calls it. Any colour does that matplotlib would not use itself.
_INK, _FAINT = "#010203", "#020304"
_SERIES = ("#030405", "#040506", "#050607", "#060708")
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    **{color: f"var(--series-{index})" for index, color in enumerate(_SERIES)},
}
_MARKERS = ("o", "s", "^", "D")
_SIZE_INCHES = (5.6, 3.9)
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moebound",  # the same drawing for the same figures
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "legend.frameon": False,
}


def rate_against_kl(rows: Sequence[Row]) -> str:
    """How far the model moves as the bound grows; both axes logarithmic."""
    return _plot(
        rows,
        lambda row: row.rate,
        x_label="rate: the bound, as a share of the mean |weight|",
        log_x=True,
        alt="Mean KL divergence against rate, one line per codec",
    )


def bits_against_kl(rows: Sequence[Row]) -> str:
    """What a closer model costs in bits; the exact codecs as a line to stay left of."""
    exact = [row for row in rows if row.rate is None]
    return _plot(
        rows,
        lambda row: row.expert_bits_per_weight,
        x_label="bits per weight, experts",
        log_x=False,
        alt="Mean KL divergence against bits per weight, one line per codec",
        verticals={f"{row.codec}: KL 0": row.expert_bits_per_weight for row in exact},
    )


def _plot(
    rows: Sequence[Row],
    x_of: Callable[[Row], float | None],
    *,
    x_label: str,
    log_x: bool,
    alt: str,
    verticals: dict[str, float] | None = None,
) -> str:
    # Heavy, and not needed by anyone who only imports this package.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        codecs = list(dict.fromkeys(row.codec for row in rows if row.rate is not None))
        for index, codec in enumerate(codecs):
            chosen = [r for r in rows if r.codec == codec and r.rate is not None and r.kl_nats > 0]
            axes.errorbar(
                [x_of(row) for row in chosen],
                [row.kl_nats for row in chosen],
                yerr=[2 * row.kl_stderr for row in chosen],
                label=codec,
                color=_SERIES[index % len(_SERIES)],
                marker=_MARKERS[index % len(_MARKERS)],
                # The second marker is hollow and larger, so that two that coincide are both seen.
                markersize=5 + 3 * index,
                markerfacecolor=_SERIES[0] if index == 0 else "none",
                linewidth=1.6,
                elinewidth=1.2,
                capsize=2.5,
            )
        axes.set_yscale("log")
        axes.set_ylabel("mean KL(original || compressed), nats")
        axes.set_xlabel(x_label)
        if log_x:
            axes.set_xscale("log")
            ticks = sorted({row.rate for row in rows if row.rate is not None})
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for label, x in (verticals or {}).items():
            axes.axvline(x, color=_INK, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                label,
                (x, 0.5),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="center",
            )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(True, which="major", linewidth=0.7)
        axes.set_axisbelow(True)
        if codecs:
            axes.legend(loc="best")
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(drawing.getvalue(), alt)


def _for_page(svg: str, alt: str) -> str:
    """Inline SVG: no XML prologue, no metadata, the page's colours, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    # Both drawings are on one page: without this, the second's ids would find the first's parts.
    prefix = re.sub(r"\W+", "-", alt.lower())
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'"#([A-Za-z][^"]*)"', rf'"#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{alt}"', 1).strip()
