"""matplotlib's drawings as inline SVG that follows the page's colours.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables, and
leaves text as text: so one drawing serves a light and a dark page, in the page's own font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moebound.extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-in colour -> what the page calls it. Any colour does that matplotlib would not use itself.
INK, FAINT, SOFT = "#010203", "#020304", "#030301"
SERIES = ("#030405", "#040506", "#050607", "#060708", "#070809", "#08090a", "#090a0b", "#0a0b0c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ((0, ()), (0, (4, 2)), (0, (1, 1.5)))
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    SOFT: "var(--soft)",
    **{color: f"var(--series-{index})" for index, color in enumerate(SERIES)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moebound",  # the same drawing for the same figures
    "text.parse_math": False,  # a name with a dollar sign is a name
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "legend.frameon": False,
}


def drawing(
    size_inches: tuple[float, float], draw: Callable[[Figure], None], *, name: str, alt: str
) -> str:
    """One figure, drawn by `draw` on an empty canvas, as inline SVG.

    name: of this drawing, unique on its page. alt: what it shows, for who cannot see it.
    """
    # Heavy, and not needed by anyone who only imports this package.
    mpl = need("matplotlib", "drawing")
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure)
        return inline(figure, name=name, alt=alt)


def inline(
    figure: Figure, *, name: str, alt: str, colors: Mapping[str, str] = MappingProxyType(_VARIABLES)
) -> str:
    """A figure that is drawn already, as inline SVG. colors: what stands in for which of the
    page's; others stay."""
    mpl = need("matplotlib", "drawing")
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    style: Any = {key: _STYLE[key] for key in ("svg.fonttype", "svg.hashsalt", "text.parse_math")}
    with mpl.rc_context(style), warnings.catch_warnings():
        # The browser has other fonts: what matplotlib's lacks it need not warn of.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasSVG(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(written.getvalue(), name, alt, colors)


def _for_page(svg: str, name: str, alt: str, colors: Mapping[str, str]) -> str:
    """Inline SVG: no XML prologue, no metadata, the page's colours, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in colors.items():
        svg = svg.replace(color, variable)
    # Many drawings are on one page: without this, one's ids would find another's parts.
    prefix = re.sub(r"\W+", "-", name.lower())
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'"#([A-Za-z][^"]*)"', rf'"#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows them
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = escape(alt, quote=True)
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{label}"', 1).strip()
